"""One scheduler for the status polls of all tasks: a heap by due time, never a loop per task.

Polls have permits and a rate of their own. With more tasks than the rate allows, the oldest due
goes first and polls are late, which costs nothing but time. A poll brings a status, never a
result; what it means is decided here.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

import attrs

from cloudinary_analyze._clock import Clock, TimerHandle, wake
from cloudinary_analyze._tasks.handle import MISSES
from cloudinary_analyze._tasks.table import Answer, Entry, Table
from cloudinary_analyze._tasks.timers import DueHeap
from cloudinary_analyze._wire.protocol import build_task_failure, find_result
from cloudinary_analyze.config import Settings
from cloudinary_analyze.errors import (
    AnalyzeError,
    AuthenticationError,
    NotFoundError,
    PermissionDeniedError,
)
from cloudinary_analyze.responses import TaskStatus

if TYPE_CHECKING:
    from cloudinary_analyze._http.call import Caller

logger = logging.getLogger("cloudinary_analyze")

GROWTH: Final = 1.6
RUNNING: Final = frozenset({"pending", "processing"})
FIRST_MINUTE: Final = 60.0  # a task may be unknown to the service for a while


def compute_interval(previous: float, settings: Settings, *, with_source: bool) -> float:
    """Return the seconds to the next poll, before jitter: growing, up to the longest."""
    first = settings.poll_first or (5.0 if with_source else 1.0)
    longest = settings.poll_longest or (300.0 if with_source else 30.0)
    return min(previous * GROWTH if previous else first, max(first, longest))


@attrs.define(eq=False, repr=False)
class Poller:
    """Polls what is due, and acts on what it hears.

    Attributes:
        with_source: Whether notifications may arrive at all.
        on_missing: Is told of a completed task whose result will not come.
    """

    table: Table
    caller: Caller
    settings: Settings
    clock: Clock
    with_source: bool
    on_missing: Callable[[Entry], None]
    _due: DueHeap[Entry] = attrs.field(factory=DueHeap)
    _workers: set[asyncio.Task[None]] = attrs.field(factory=set)
    _turn: asyncio.Lock = attrs.field(factory=asyncio.Lock)
    _sleeper: asyncio.Future[None] | None = None
    _sleeps_until: float | None = None
    _next_start: float = 0.0
    _stopped: bool = False
    _refused: bool = False
    _warned: set[str] = attrs.field(factory=set)

    def __attrs_post_init__(self) -> None:
        self.table.forget_poll = self._due.discard
        self.table.end_grace = self._end_grace

    @property
    def scheduled(self) -> int:
        """How many tasks have a poll to come."""
        return len(self._due)

    def schedule(self, entry: Entry, *, at_once: bool = False) -> None:
        """Put a task's next poll in its place."""
        if self._stopped or self._refused or entry.answer is not None:
            return
        if entry.poll is not None:
            self._due.discard(entry.poll)
        wait = 0.0
        if not at_once:
            entry.interval = compute_interval(
                entry.interval, self.settings, with_source=self.with_source
            )
            wait = entry.interval * random.uniform(0.8, 1.2)
        due = self.clock.monotonic() + wait
        entry.poll = self._due.push(due, entry)
        if not self._workers:
            self._start()
        if self._sleeper is not None and (self._sleeps_until is None or due < self._sleeps_until):
            wake(self._sleeper)  # whoever sleeps looks at the heap again

    def _start(self) -> None:
        for _ in range(self.settings.poll_permits):
            worker = asyncio.create_task(self._work())
            self._workers.add(worker)

    async def _work(self) -> None:
        while True:
            async with self._turn:
                entry = await self._take()
            try:
                await self._poll(entry)
            except Exception:
                logger.exception("A status poll broke; it is made again later.")
                if entry.waits:
                    self.schedule(entry)

    async def _take(self) -> Entry:
        """Wait until a poll is due and the rate allows it."""
        while True:
            due = self._due.next_due()
            now = self.clock.monotonic()
            if due is not None and max(due, self._next_start) <= now:
                self._next_start = max(now, self._next_start) + 1 / self.settings.polls_per_second
                entry = self._due.pop()
                entry.poll = None
                return entry
            self._sleeper = asyncio.get_running_loop().create_future()
            self._sleeps_until = None if due is None else max(due, self._next_start)
            timer: TimerHandle | None = None
            if self._sleeps_until is not None:
                timer = self.clock.call_at(self._sleeps_until, partial(wake, self._sleeper))
            try:
                await self._sleeper
            finally:
                self._sleeper = None
                if timer is not None:
                    timer.cancel()

    async def _poll(self, entry: Entry) -> None:
        assert entry.task_id is not None
        try:
            status = await self.caller.get_task_status(entry.task_id, attempts=1)
        except AnalyzeError as error:
            if entry.answer is None:
                self._take_error(entry, error)
            return
        if entry.answer is None:
            self.take_status(entry, status)

    def take_status(self, entry: Entry, status: TaskStatus) -> None:
        """Act on what a poll says of a pending task."""
        entry.misses = 0
        if (data := find_result(status)) is not None:
            answer = Answer("poll", data, status.raw)
            self.table.answer(entry, answer, state=status.state)
            return
        changed = entry.state != status.state
        entry.state = status.state
        if status.finished:
            self._await_notification(entry, failed=status.state == "failed")
        else:
            if status.state not in RUNNING and status.state not in self._warned:
                self._warned.add(status.state)
                logger.warning(
                    "The service reports a task state %.40r that this package does not know; "
                    "it counts as still running.",
                    status.state,
                )
            if entry.waits:
                self.schedule(entry)
        if changed:
            entry.tell()

    def _await_notification(self, entry: Entry, *, failed: bool) -> None:
        """Give the notification of a finished task its time, where one may come at all."""
        if not entry.waits:
            return  # whoever comes back polls again; nothing is repeated for nobody
        grace = self.settings.failure_grace if failed else self.settings.result_grace
        if not self.with_source or grace == 0:
            self._end_grace(entry)
        elif entry.grace is None:
            entry.grace = self.table.timers.push(self.clock.monotonic() + grace, entry)

    def _end_grace(self, entry: Entry) -> None:
        if entry.state != "failed":
            self.on_missing(entry)
            return
        assert entry.task_id is not None
        error = build_task_failure(entry.task_id, model=entry.model)
        self.table.answer(entry, Answer("poll", error=error), state="failed")

    def _take_error(self, entry: Entry, error: AnalyzeError) -> None:
        """Act on a poll that brought no status. With a source it never fails a task."""
        if self._stopped or not entry.waits:
            return
        if isinstance(error, AuthenticationError | PermissionDeniedError):
            if not self.with_source:
                self.table.answer(entry, Answer("poll", error=error))
                return
            if not self._refused:
                self._refused = True
                self._due.clear()
                logger.warning(
                    "Status polls are refused (%s), so they stop; only notifications answer "
                    "tasks now. An OAuth token needs the scope query_analysis_tasks.",
                    error,
                )
            return
        if isinstance(error, NotFoundError):
            age = self.clock.monotonic() - entry.since
            entry.misses += age >= FIRST_MINUTE
            entry.tell()  # a ledger's run submits anew what the service has forgotten
            if entry.misses >= MISSES and not self.with_source:
                self.table.answer(entry, Answer("poll", error=error))
                return
        self.schedule(entry)

    def stop(self) -> set[asyncio.Task[None]]:
        """End all polls; return what is ending."""
        self._stopped = True
        self._due.clear()
        for worker in self._workers:
            worker.cancel()
        return self._workers
