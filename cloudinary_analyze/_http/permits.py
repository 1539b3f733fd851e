"""Permits: how many attempts may be on the wire, and when none may start at all.

A permit is for one attempt; it is never held while sleeping or waiting for anything else. When
the service asks to slow down, all attempts pause and the permits are halved, once for all the
attempts that began before; they grow back by one for each window of successes.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from copy import copy

import attrs

from cloudinary_analyze._clock import Clock, TimerHandle, wake


@attrs.define(eq=False, repr=False)
class Permits:
    """Hands out permits, first come first served.

    Where `idle` is true, a caller may take a permit by counting `in_use` up itself, which saves
    the hot path a coroutine; otherwise it awaits `acquire`. Either way it calls `release`.

    Attributes:
        permits: The most that are ever handed out at once.
        allowed: The most that are handed out at once now.
        in_use: Permits held now.
        generation: Counts the cuts; an attempt remembers the one that it began in.
        resume_at: Monotonic instant when a pause ends; ``None`` while there is none.
    """

    permits: int
    clock: Clock
    allowed: int = attrs.field(init=False)
    in_use: int = attrs.field(default=0, init=False)
    generation: int = attrs.field(default=0, init=False)
    resume_at: float | None = attrs.field(default=None, init=False)
    _waiters: OrderedDict[asyncio.Future[None], None] = attrs.field(factory=OrderedDict, init=False)
    _successes: int = attrs.field(default=0, init=False)
    _timer: TimerHandle | None = attrs.field(default=None, init=False)
    _closed: Exception | None = attrs.field(default=None, init=False)
    _emptied: asyncio.Future[None] | None = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self.allowed = self.permits

    @property
    def waiting(self) -> int:
        """How many attempts queue for a permit."""
        return len(self._waiters)

    @property
    def idle(self) -> bool:
        """Whether a permit can be had at once."""
        return (
            self.in_use < self.allowed
            and self.resume_at is None
            and not self._waiters
            and self._closed is None
        )

    async def acquire(self) -> None:
        """Wait for a permit and take it. Cancelling leaves the queue as it was."""
        if self._closed is not None:
            raise copy(self._closed)
        if self.idle:
            self.in_use += 1
            return
        at_head = False
        while True:
            granted = asyncio.get_running_loop().create_future()
            self._waiters[granted] = None
            if at_head:
                self._waiters.move_to_end(granted, last=False)
            try:
                await granted
            except BaseException:
                if granted.done() and not granted.cancelled() and granted.exception() is None:
                    self.release()
                else:
                    self._waiters.pop(granted, None)
                raise
            # a close or a pause may have begun between the hand-out and now
            if self._closed is not None:
                self.release()
                raise copy(self._closed)
            if self.resume_at is None:
                return
            self.release()
            at_head = True

    def release(self) -> None:
        """Give a permit back."""
        self.in_use -= 1
        if self._waiters:
            self._hand_out()
        elif self._emptied is not None and not self.in_use:
            wake(self._emptied)

    async def wait_empty(self) -> None:
        """Wait until no permit is held. For one waiter, once nothing is handed out any more."""
        if self.in_use:
            self._emptied = asyncio.get_running_loop().create_future()
            await self._emptied

    def succeed(self) -> None:
        """Count a success; after a window of them, allow one permit more."""
        if self.allowed < self.permits:
            self._successes += 1
            if self._successes >= self.allowed:
                self._successes = 0
                self.allowed += 1
                self._hand_out()

    def throttle(self, generation: int, seconds: float) -> bool:
        """Pause, and halve the permits if no attempt of the same generation did so before.

        Args:
            generation: The generation in which the throttled attempt began.
            seconds: How long to pause from now; a pause is never shortened.

        Returns:
            Whether the permits were cut.
        """
        cut = generation == self.generation
        if cut:
            self.generation += 1
            self.allowed = max(1, self.allowed // 2)
            self._successes = 0
        resume_at = self.clock.monotonic() + seconds
        if self.resume_at is None or resume_at > self.resume_at:
            self.resume_at = resume_at
            if self._timer is not None:
                self._timer.cancel()
            self._timer = self.clock.call_at(resume_at, self._resume)
        return cut

    def close(self, error: Exception) -> None:
        """Fail everything that queues, and all that comes later."""
        self._closed = error
        if self._timer is not None:
            self._timer.cancel()
        while self._waiters:
            granted, _ = self._waiters.popitem(last=False)
            if not granted.done():
                granted.set_exception(copy(error))  # one each: they gather tracebacks

    def _resume(self) -> None:
        self.resume_at = self._timer = None
        self._hand_out()

    def _hand_out(self) -> None:
        while self._waiters and self.in_use < self.allowed and self.resume_at is None:
            granted, _ = self._waiters.popitem(last=False)
            if not granted.done():
                self.in_use += 1
                granted.set_result(None)
