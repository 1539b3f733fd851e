"""The suite detects blocking calls in the package's coroutines."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blockbuster
import pytest
import uvloop
from blocking import ALLOWED, PACKAGE, is_measured, take_blocked

TESTS = Path(__file__).parents[1]


@pytest.mark.skipif(is_measured(), reason="coverage's tracer blocks, too")
@pytest.mark.parametrize("factory", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_a_blocking_coroutine_of_the_package_raises(factory: Callable[[], Any]) -> None:
    code = "async def block():\n    sleep(0)\n"
    names = {"sleep": time.sleep}
    exec(compile(code, str(PACKAGE / "example.py"), "exec"), names)
    with asyncio.Runner(loop_factory=factory) as runner:
        with pytest.raises(blockbuster.BlockingError):
            runner.run(names["block"]())
    assert len(take_blocked()) == 1


@pytest.mark.parametrize(("place", "functions"), ALLOWED)
def test_each_exception_exists(place: str, functions: set[str]) -> None:
    if place.startswith("<") or place in {"logging/__init__.py", "weakref.py"}:
        return  # part of the interpreter
    path = (TESTS if place.startswith(("unit/", "chaos/")) else PACKAGE) / place.removeprefix(
        "cloudinary_analyze/"
    )
    source = path.read_text()
    assert [name for name in functions if f"def {name}(" not in source] == []
