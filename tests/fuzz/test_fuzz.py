"""The harnesses of `fuzz_targets` under hypothesis; `python tests/fuzz` runs them for longer."""

from __future__ import annotations

from typing import Any

import pytest
from fuzz_targets import TARGETS, Target
from hypothesis import given, settings
from hypothesis import strategies as st

EXAMPLES = {
    "codec": 200,
    "cloudinary-url": 200,
    "notification": 200,
    "retry-after": 200,
    "redis": 200,
}
FEWER = 50  # of the targets with servers or files


@st.composite
def make_input(draw: Any, target: Target) -> bytes:
    """Return a seed with a few changes, or arbitrary bytes."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    data = bytearray(draw(st.sampled_from(target.seeds)))
    for kind in draw(st.lists(st.integers(0, 4), max_size=5)):
        begin = draw(st.integers(0, len(data)))
        end = begin + draw(st.integers(0, 40))
        match kind:
            case 0:
                data[begin:end] = draw(st.binary(max_size=8))
            case 1:
                data[begin:begin] = draw(st.sampled_from((*target.words, b"\0")))
            case 2:
                data[begin:begin] = data[begin:end] * draw(st.integers(1, 40))
            case 3:
                del data[begin:]
            case _:
                data[:1] = draw(st.binary(min_size=1, max_size=1))
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_every_input_keeps_the_promises_of_its_target(name: str) -> None:
    target = TARGETS[name]
    with target.open() as run:

        @settings(max_examples=EXAMPLES.get(name, FEWER))
        @given(make_input(target))
        def check(data: bytes) -> None:
            run(data)

        check()


@pytest.mark.parametrize("name", TARGETS)
def test_every_seed_is_handled(name: str) -> None:
    target = TARGETS[name]
    with target.open() as run:
        for seed in target.seeds:
            run(seed)
