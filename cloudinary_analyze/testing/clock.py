"""A clock for tests, which moves only on request."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import TypeVar

import attrs

from cloudinary_analyze._clock import wake

T = TypeVar("T")


@attrs.define(eq=False)
class _Timer:
    callback: Callable[[], None] | None

    def cancel(self) -> None:
        self.callback = None


@attrs.define(eq=False)
class ManualClock:
    """A clock that moves only on request.

    ```python
    import asyncio

    clock = ManualClock()
    waiting = asyncio.create_task(clock.sleep(60))
    await clock.advance(60)
    await waiting
    ```

    Attributes:
        now: Seconds since the clock was created: the monotonic reading.
        started_at: Unix seconds of the wall clock at ``now == 0``.
    """

    now: float = 0.0
    started_at: float = attrs.field(default=1_790_000_000.0, kw_only=True)
    _timers: list[tuple[float, int, _Timer]] = attrs.field(factory=list, init=False)
    _order: Iterator[int] = attrs.field(factory=itertools.count, init=False)

    def monotonic(self) -> float:
        """Return the monotonic reading, in seconds."""
        return self.now

    def wall(self) -> float:
        """Return the reading of the wall clock, in Unix seconds. It moves with `now`."""
        return self.started_at + self.now

    def call_at(self, when: float, callback: Callable[[], None], /) -> _Timer:
        """Run a callback once the clock reaches an instant, or at once if it already has.

        Args:
            when: The instant, as a reading of `monotonic`.
            callback: A function without arguments.

        Returns:
            An object whose ``cancel()`` withdraws the callback.
        """
        timer = _Timer(callback)
        if when <= self.now:
            asyncio.get_running_loop().call_soon(self._fire, timer)
        else:
            heapq.heappush(self._timers, (when, next(self._order), timer))
        return timer

    async def sleep(self, seconds: float) -> None:
        """Wait until the clock has moved on. Cancelling is safe.

        Args:
            seconds: How many seconds it must move. 0 or less: one turn of the loop.
        """
        if seconds <= 0:
            await asyncio.sleep(0)
            return
        woken = asyncio.get_running_loop().create_future()
        timer = self.call_at(self.now + seconds, partial(wake, woken))
        try:
            await woken
        finally:
            timer.cancel()

    def timeout_at(self, deadline: float, /) -> AbstractAsyncContextManager[asyncio.Timeout]:
        """Return a context manager whose block times out once the clock reaches an instant.

        Args:
            deadline: The instant, as a reading of `monotonic`.
        """
        return self._timeout_at(deadline)

    @asynccontextmanager
    async def _timeout_at(self, deadline: float) -> AsyncIterator[asyncio.Timeout]:
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(None) as scope:
            timer = self.call_at(deadline, lambda: scope.reschedule(loop.time()))
            try:
                yield scope
            finally:
                timer.cancel()

    @property
    def next_at(self) -> float | None:
        """The instant of the next callback. ``None`` if nothing waits for this clock."""
        while self._timers and self._timers[0][2].callback is None:
            heapq.heappop(self._timers)
        return self._timers[0][0] if self._timers else None

    async def advance(self, seconds: float) -> None:
        """Move the clock on, and run every callback at its instant.

        A cancelled call leaves the clock at the instant that it has reached.

        Args:
            seconds: How many seconds to move.
        """
        target = self.now + seconds
        await _settle()
        while (due := self.next_at) is not None and due <= target:
            self.now = max(self.now, due)
            self._fire(heapq.heappop(self._timers)[2])
            await _settle()
        self.now = target
        await _settle()

    async def run(self, awaitable: Awaitable[T], *, seconds: float = 30.0) -> T:
        """Move the clock on from timer to timer until something is done, and return its result.

        For code that waits for the clock and for the network in turn, such as retries. Cancelling
        the call cancels the awaitable.

        Args:
            awaitable: What to wait for.
            seconds: Real seconds after which it is cancelled.

        Raises:
            TimeoutError: It was not done in time.
        """
        task = asyncio.ensure_future(awaitable)
        deadline = time.monotonic() + seconds
        try:
            while not task.done():
                if time.monotonic() > deadline:
                    raise TimeoutError(f"It was not done after {seconds:g} real seconds.")
                if (due := self.next_at) is not None:
                    await self.advance(max(0.0, due - self.now))
                await asyncio.sleep(0.001)
            return await task
        finally:
            task.cancel()

    @staticmethod
    def _fire(timer: _Timer) -> None:
        callback, timer.callback = timer.callback, None
        if callback is not None:
            callback()


async def _settle() -> None:
    """Let everything that can run on the loop run a few steps."""
    for _ in range(10):
        await asyncio.sleep(0)
