"""Sessions with random cancellations, throttles, failures and closes: nothing hangs or leaks."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from sweep_support import LOOPS, run_session

GROUP = 20


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, *range(4, 204, GROUP)])
def test_nothing_hangs_and_nothing_leaks(first: int, tmp_path: Path) -> None:
    for seed in range(first, first + GROUP if first else 4):
        kind = LOOPS[seed % len(LOOPS)]
        folder = tmp_path / str(seed)
        folder.mkdir()
        try:
            run_session(seed, kind, folder)
        except Exception as error:
            raise AssertionError(f"Seed {seed} on {kind}: {error!r}") from error
