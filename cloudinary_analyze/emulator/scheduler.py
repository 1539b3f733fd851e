"""One heap and one timer for all later events, without an asyncio task per event."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable
from itertools import count
from typing import Any, Final

import attrs

_BATCH: Final = 100


@attrs.define(eq=False)
class Scheduler:
    """Calls plain functions when they are due, a bounded number per turn of the loop."""

    loop: asyncio.AbstractEventLoop
    _heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = attrs.field(
        factory=list, init=False
    )
    _order: count[int] = attrs.field(factory=count, init=False)
    _timer: asyncio.TimerHandle | None = attrs.field(default=None, init=False)
    _closed: bool = attrs.field(default=False, init=False)

    def push(self, delay: float, callback: Callable[..., None], *arguments: Any) -> None:
        """Call ``callback(*arguments)`` in ``delay`` seconds. It must be quick and must not raise."""
        due = self.loop.time() + delay
        heapq.heappush(self._heap, (due, next(self._order), callback, arguments))
        if self._heap[0][0] == due:
            self._arm()

    def close(self) -> None:
        """Drop all scheduled calls."""
        self._closed = True
        self._heap.clear()
        self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._heap and not self._closed:
            self._timer = self.loop.call_at(self._heap[0][0], self._run)

    def _run(self) -> None:
        now = self.loop.time()
        for _ in range(_BATCH):
            if not self._heap or self._heap[0][0] > now:
                break
            _, _, callback, arguments = heapq.heappop(self._heap)
            callback(*arguments)
        self._arm()
