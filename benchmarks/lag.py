"""How late the event loop runs its callbacks."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Sequence
from typing import Final

TICK: Final = 0.002  # seconds


class LoopLag:
    """Samples the lag of the running loop, in milliseconds, until it is stopped."""

    def __init__(self) -> None:
        self._samples: list[float] = []
        self._task = asyncio.create_task(self._sample())

    async def _sample(self) -> None:
        while True:
            due = time.perf_counter() + TICK
            await asyncio.sleep(TICK)
            self._samples.append(1e3 * max(0.0, time.perf_counter() - due))

    def take(self) -> list[float]:
        """Return the samples since the last call."""
        taken, self._samples = self._samples, []
        return taken

    def stop(self) -> list[float]:
        """Stop, and return the samples since the last `take`."""
        self._task.cancel()
        return self.take()


def compute_p99(samples: Sequence[float]) -> float:
    """Return the 99th percentile."""
    return statistics.quantiles(samples, n=100, method="inclusive")[98]
