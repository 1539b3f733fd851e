"""One timer for the read timeouts of all attempts.

All attempts have the same timeout, so the oldest always expires first, and one timer for the
oldest is enough. A timer for each attempt, ours or aiohttp's, costs several times as much.
"""

from __future__ import annotations

import asyncio

import attrs


@attrs.define(eq=False, repr=False)
class Watch:
    """One attempt under watch.

    Attributes:
        task: Who makes it.
        deadline: The loop's time when it has taken too long.
        expired: Whether it was cancelled for that.
        cancelling: How many cancellations the task had seen before.
    """

    task: asyncio.Task[object]
    deadline: float
    expired: bool = False
    cancelling: int = 0


@attrs.define(eq=False, repr=False)
class Watchdog:
    """Cancels attempts that take too long, in real time.

    Attributes:
        seconds: How long an attempt may take.
        loop: The session's.
    """

    seconds: float
    loop: asyncio.AbstractEventLoop
    _watched: dict[Watch, None] = attrs.field(factory=dict)
    _timer: asyncio.TimerHandle | None = None

    def begin(self) -> Watch:
        """Watch the running task's attempt, until `end`."""
        task = asyncio.current_task(self.loop)
        assert task is not None
        watch = Watch(task, self.loop.time() + self.seconds)
        self._watched[watch] = None
        if self._timer is None:
            self._timer = self.loop.call_at(watch.deadline, self._sweep)
        return watch

    def end(self, watch: Watch) -> None:
        """Forget an attempt."""
        self._watched.pop(watch, None)

    def _sweep(self) -> None:
        self._timer = None
        now = self.loop.time()
        for watch in list(self._watched):
            if watch.deadline > now:
                self._timer = self.loop.call_at(watch.deadline, self._sweep)
                break
            del self._watched[watch]
            watch.expired = True
            watch.cancelling = watch.task.cancelling()
            watch.task.cancel()

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
