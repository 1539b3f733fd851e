"""The clock: every sleep and deadline of this package goes through it.

Only the socket timeouts of one attempt, which belong to aiohttp, use real time.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol


class TimerHandle(Protocol):
    """A scheduled callback."""

    def cancel(self) -> None:
        """Withdraw the callback. Does nothing if it has run."""
        ...


class Clock(Protocol):
    """The time of a session. `SYSTEM_CLOCK` is real; tests inject a clock that they move."""

    def monotonic(self) -> float:
        """Return monotonic seconds, for waits and deadlines."""
        ...

    def wall(self) -> float:
        """Return Unix seconds, for timestamps that other systems understand."""
        ...

    def call_at(self, when: float, callback: Callable[[], None], /) -> TimerHandle:
        """Run a callback on the running loop at a monotonic instant."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Sleep. Cancelling is safe."""
        ...

    def timeout_at(self, deadline: float, /) -> AbstractAsyncContextManager[asyncio.Timeout]:
        """Raise `TimeoutError` in the block's task at a monotonic instant."""
        ...


class SystemClock:
    """Real time, on the running event loop."""

    monotonic = staticmethod(time.monotonic)
    wall = staticmethod(time.time)

    def call_at(self, when: float, callback: Callable[[], None], /) -> TimerHandle:
        """Schedule on the running loop, whose own clock may have another origin."""
        return asyncio.get_running_loop().call_later(max(0.0, when - time.monotonic()), callback)

    async def sleep(self, seconds: float) -> None:
        """Sleep on the running loop."""
        await asyncio.sleep(seconds)

    def timeout_at(self, deadline: float, /) -> AbstractAsyncContextManager[asyncio.Timeout]:
        """Return `asyncio.timeout`, in terms of the monotonic clock."""
        return asyncio.timeout(max(0.0, deadline - time.monotonic()))


def wake(sleeper: asyncio.Future[None]) -> None:
    """Complete a future, unless it is already done."""
    if not sleeper.done():
        sleeper.set_result(None)


def wake_next(sleepers: deque[asyncio.Future[None]]) -> None:
    """Remove futures from the left, until one was not done and is completed."""
    while sleepers:
        sleeper = sleepers.popleft()
        if not sleeper.done():
            sleeper.set_result(None)
            return


SYSTEM_CLOCK = SystemClock()
