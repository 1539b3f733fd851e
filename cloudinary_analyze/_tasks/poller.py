"""One scheduler for the status polls of all tasks: heaps by due time, never a loop per task.

Polls have separate permits and a separate rate. With more tasks than the rate allows, polls are late. A
poll that is requested now runs before this backlog. Tasks that the service has confirmed and
ids that may not exist take turns, so a flood of made-up ids takes half of the polls at most.
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Callable
from contextvars import Context, copy_context
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Final

import attrs

from cloudinary_analyze._clock import Clock, TimerHandle, wake
from cloudinary_analyze._tasks.entries import Entry
from cloudinary_analyze._tasks.table import REFUSALS
from cloudinary_analyze._tasks.timers import DueHeap
from cloudinary_analyze.config import Settings
from cloudinary_analyze.errors import AnalyzeError, describe, shorten
from cloudinary_analyze.responses import TaskStatus

if TYPE_CHECKING:
    from cloudinary_analyze._http.caller import Caller

logger = logging.getLogger("cloudinary_analyze.tasks")

GROWTH: Final = 1.6
KNOWN_STATES: Final = frozenset({"pending", "processing", "completed", "failed"})
URGENT: Final = 1e9  # seconds that a requested poll is ahead of the backlog
FIRST_PAUSE: Final = 2.0  # seconds, after a poll was refused (401, 403)
LONGEST_PAUSE: Final = 300.0
PAUSE_GROWTH: Final = 8.0
MOST_WARNINGS: Final = 100  # of unknown states


def compute_interval(previous: float, settings: Settings, *, with_source: bool) -> float:
    """Return the seconds to the next poll, before jitter: growing, up to the longest."""
    first = settings.poll_first or (5.0 if with_source else 1.0)
    longest = settings.poll_longest or (300.0 if with_source else 30.0)
    return min(previous * GROWTH if previous else first, max(first, longest))


def _build_heap() -> DueHeap[Entry]:
    return DueHeap(attrgetter("poll_at"))


@attrs.define(eq=False, repr=False)
class Poller:
    """Polls the status of tasks that are due, and passes the outcomes on.

    Attributes:
        with_source: Whether notifications can arrive at all.
        take: Takes the outcome of a poll.
    """

    caller: Caller
    settings: Settings
    clock: Clock
    with_source: bool
    take: Callable[[Entry, TaskStatus | Exception], None]
    _known: DueHeap[Entry] = attrs.field(factory=_build_heap, init=False)
    _unknown: DueHeap[Entry] = attrs.field(factory=_build_heap, init=False)
    _known_first: bool = attrs.field(default=True, init=False)
    _workers: set[asyncio.Task[None]] = attrs.field(factory=set, init=False)
    _context: Context = attrs.field(factory=copy_context, init=False)
    _turn: asyncio.Lock = attrs.field(factory=asyncio.Lock, init=False)
    _sleeper: asyncio.Future[None] | None = attrs.field(default=None, init=False)
    _sleeps_until: float = attrs.field(default=math.inf, init=False)
    _next_start: float = attrs.field(default=0.0, init=False)
    _pause: float = attrs.field(default=0.0, init=False)
    _paused_at: float = attrs.field(default=-math.inf, init=False)
    _stopped: bool = attrs.field(default=False, init=False)
    _warned: set[str] = attrs.field(factory=set, init=False)

    def schedule(self, entry: Entry, *, at_once: bool = False) -> None:
        """Schedule a task's next poll. It replaces an earlier schedule."""
        if self._stopped:
            return
        now = self.clock.monotonic()
        if at_once:
            due = now - URGENT
        else:
            entry.interval = compute_interval(
                entry.interval, self.settings, with_source=self.with_source
            )
            due = now + entry.interval * random.uniform(0.8, 1.2)
        entry.poll_at = due
        (self._known if entry.verified else self._unknown).push(due, entry)
        if not self._workers:
            self._start()
        if self._sleeper is not None and due < self._sleeps_until:
            wake(self._sleeper)  # the sleeping worker looks at the heaps again

    def _start(self) -> None:
        for _ in range(self.settings.poll_permits):
            # not in the context of the request handler that submitted the first task
            self._workers.add(self._context.run(asyncio.create_task, self._work()))

    async def _work(self) -> None:
        while True:
            async with self._turn:
                entry = await self._take_next()
            begun = self.clock.monotonic()
            assert entry.task_id is not None
            outcome: TaskStatus | Exception
            try:
                outcome = await self.caller.get_task_status(entry.task_id, attempts=1)
            except Exception as error:
                outcome = error
            if not self._stopped:
                self._observe(outcome, begun)
                self.take(entry, outcome)

    def _observe(self, outcome: TaskStatus | Exception, begun: float) -> None:
        """Log unexpected outcomes, and pause all polls while they are refused."""
        if isinstance(outcome, TaskStatus):
            self._pause = 0.0
            if outcome.state in KNOWN_STATES or len(self._warned) >= MOST_WARNINGS:
                return
            if (shown := shorten(outcome.state, 40)) not in self._warned:
                self._warned.add(shown)
                logger.warning("Unknown task state %r. The task counts as still running.", shown)
        elif isinstance(outcome, REFUSALS) and self.with_source:
            if begun < self._paused_at:
                return  # sent before the pause that another poll began
            if not self._pause:
                logger.warning(
                    "Status polls are refused (%s). They pause and resume within minutes; until "
                    "then only notifications resolve tasks. An OAuth token needs the scope "
                    "query_analysis_tasks.",
                    describe(outcome),
                )
            self._pause = min(self._pause * PAUSE_GROWTH or FIRST_PAUSE, LONGEST_PAUSE)
            self._paused_at = self.clock.monotonic()
            self._next_start = self._paused_at + self._pause
            if self.caller.meter.hook is not None:
                from cloudinary_analyze.events import SessionPaused

                self.caller.meter.emit(
                    SessionPaused(
                        seconds=self._pause,
                        permits=self.settings.poll_permits,
                        polls=True,
                        cause="refused",
                    )
                )
        elif not isinstance(outcome, AnalyzeError):
            logger.error("A status poll failed unexpectedly; it is retried.", exc_info=outcome)

    async def _take_next(self) -> Entry:
        """Wait until a poll is due and the rate allows it."""
        while True:
            now = self.clock.monotonic()
            due = self._next_due()
            at = max(due, self._next_start)
            if at <= now:
                self._next_start = max(now, self._next_start) + 1 / self.settings.polls_per_second
                return self._pop(now)
            self._sleeper = asyncio.get_running_loop().create_future()
            self._sleeps_until = at
            timer: TimerHandle | None = None
            if at < math.inf:
                timer = self.clock.call_at(at, partial(wake, self._sleeper))
            try:
                await self._sleeper
            finally:
                self._sleeper = None
                if timer is not None:
                    timer.cancel()

    def _next_due(self) -> float:
        known, unknown = self._known.next_due(), self._unknown.next_due()
        return min(math.inf if due is None else due for due in (known, unknown))

    def _pop(self, now: float) -> Entry:
        """Return an entry that is due: of the kind whose turn it is, if there is one."""
        heaps = [self._known, self._unknown]
        if not self._known_first:
            heaps.reverse()
        due = heaps[0].next_due()
        heap = heaps[0] if due is not None and due <= now else heaps[1]
        self._known_first = heap is self._unknown
        entry = heap.pop()
        entry.poll_at = None
        return entry

    def stop(self) -> set[asyncio.Task[None]]:
        """End all polls and return the asyncio tasks that are ending."""
        self._stopped = True
        for worker in self._workers:
            worker.cancel()
        return self._workers
