"""One entry per task, many waits on it. Whoever brings the first answer wins; the rest is counted.

Entries come to know their task id with the 202. An answered entry can be taken up again by its id
for a while, and a notification that is here before its task is known waits for it, within bounds.
State changes are plain functions: no entry is ever seen half-way through one.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import attrs

from cloudinary_analyze._clock import Clock
from cloudinary_analyze._http.meter import Meter
from cloudinary_analyze._resolve.timers import Node, Timers
from cloudinary_analyze._wire.protocol import build_task_failure
from cloudinary_analyze.config import Settings
from cloudinary_analyze.errors import TaskTimeoutError
from cloudinary_analyze.events import NotificationSeen, TaskAnswered
from cloudinary_analyze.requests import AnalyzeRequest
from cloudinary_analyze.responses import Notification, Response

SUBMITTING = "submitting"


@attrs.frozen
class Answer:
    """What ended a task: a response, a payload not decoded yet, or an error.

    Attributes:
        by: See `TaskAnswered`.
        response: Of a call.
        data: ``{"entity": …, "analysis": …}`` of a notification; decoded by each handle.
        raw: Its envelope.
        error: Why there is none of these.
    """

    by: str
    response: Response[Any] | None = None
    data: Mapping[str, Any] | None = None
    raw: Mapping[str, Any] | None = None
    error: Exception | None = None


@attrs.define(eq=False)
class Wait:
    """One handle's interest in an entry, with a deadline of its own."""

    entry: Entry
    deadline: Node | None = None
    ended: TaskTimeoutError | None = None


@attrs.define(eq=False)
class Entry:
    """What is known of one task.

    Attributes:
        request: What was asked; ``None`` if the task was taken up by its id.
        task_id: ``None`` until the service accepted it.
        state: The remote state as last heard of.
        answer: ``None`` while it is pending.
        accepted_at: Monotonic instant of the registration.
        waits: The handles that still wait.
        poll: Its place among the polls to come.
        grace: The timer that ends the wait for a notification that should have come.
        interval: Seconds before the last poll.
        misses: Polls that did not find the task.
    """

    request: AnalyzeRequest[Any] | None
    task_id: str | None = None
    state: str = SUBMITTING
    answer: Answer | None = None
    accepted_at: float = 0.0
    waits: list[Wait] = attrs.field(factory=list)
    poll: Node | None = None
    grace: Node | None = None
    interval: float = 0.0
    misses: int = 0
    _waiters: list[asyncio.Future[None]] | None = None

    @property
    def model(self) -> str:
        """The model's wire name, for messages."""
        return self.request.model if self.request is not None else "model not known here"

    async def change(self) -> None:
        """Wait for the next change of any kind. Cancelling is safe."""
        woken = asyncio.get_running_loop().create_future()
        if self._waiters is None:
            self._waiters = []
        self._waiters.append(woken)
        try:
            await woken
        finally:
            if not woken.done() or woken.cancelled():
                self._forget(woken)

    def _forget(self, woken: asyncio.Future[None]) -> None:
        if self._waiters is not None and woken in self._waiters:
            self._waiters.remove(woken)

    def tell(self) -> None:
        """Wake everybody who waits for a change."""
        waiters, self._waiters = self._waiters, None
        for woken in waiters or ():
            if not woken.done():
                woken.set_result(None)


@attrs.define(eq=False)
class Table:
    """The tasks of a session, and what arrived for tasks not known yet.

    Attributes:
        forget_poll: Takes an entry from the polls to come; set by the poller.
    """

    settings: Settings
    clock: Clock
    meter: Meter
    timers: Timers
    pending: dict[str, Entry] = attrs.field(factory=dict)
    forget_poll: Callable[[Node], None] | None = None
    _answered: OrderedDict[str, tuple[float, Entry]] = attrs.field(factory=OrderedDict)
    _parked: OrderedDict[str, tuple[float, int, Notification]] = attrs.field(factory=OrderedDict)
    _parked_bytes: int = 0

    @property
    def parked(self) -> int:
        """How many notifications wait for their task to become known."""
        self._expire_parked()
        return len(self._parked)

    def find(self, task_id: str) -> Entry | None:
        """Return the entry of a task, pending or lately answered."""
        entry = self.pending.get(task_id)
        if entry is None:
            self._expire_answered()
            _, entry = self._answered.get(task_id, (0.0, None))
        return entry

    def register(self, entry: Entry, task_id: str) -> bool:
        """Take in an accepted task; what is parked for it answers it at once.

        Returns:
            Whether it is pending and somebody waits for it.
        """
        entry.task_id = task_id
        entry.accepted_at = self.clock.monotonic()
        if entry.state == SUBMITTING:
            entry.state = "pending"
        self.pending[task_id] = entry
        self._expire_parked()
        parked = self._parked.pop(task_id, None)
        if parked is not None:
            self._parked_bytes -= parked[1]
            self.deliver(parked[2], parked[1])
        if entry.answer is None and not entry.waits:
            self._rest(entry)  # whoever submitted it stopped waiting meanwhile
        entry.tell()
        return entry.answer is None and bool(entry.waits)

    def deliver(self, notification: Notification, size: int) -> str:
        """Answer the task that a verified notification names; return the verdict.

        Args:
            notification: What arrived.
            size: Its bytes, for the bounds of what is parked.
        """
        verdict = self._deliver(notification, size)
        self.count(verdict, notification.task_id)
        return verdict

    def _deliver(self, notification: Notification, size: int) -> str:
        task_id = notification.task_id
        if task_id is None:
            return "unrelated"
        if not notification.failed and not _holds_analysis(notification):
            return "malformed"
        entry = self.find(task_id)
        if entry is None:
            return self._park(task_id, notification, size)
        if entry.answer is not None:
            return "duplicate"
        if notification.failed:
            error = build_task_failure(task_id, model=entry.model, notification=notification)
            self.answer(entry, Answer("notification", error=error), state="failed")
        else:
            answer = Answer("notification", data=notification.data, raw=notification.raw)
            self.answer(entry, answer, state="completed")
        return "resolved"

    def count(self, verdict: str, task_id: str | None = None) -> None:
        """Count a delivery that was looked at."""
        self.meter.notifications[verdict] += 1
        if self.meter.hook is not None:
            self.meter.tell(NotificationSeen(verdict=verdict, task_id=task_id))

    def answer(self, entry: Entry, answer: Answer, *, state: str | None = None) -> bool:
        """End a task, unless it has ended already.

        Returns:
            Whether this was the first answer.
        """
        if entry.answer is not None:
            return False
        entry.answer = answer
        if state is not None:
            entry.state = state
        self._drop_timers(entry)
        for wait in entry.waits:
            if wait.deadline is not None:
                self.timers.cancel(wait.deadline)
        entry.waits.clear()
        if entry.task_id is not None:
            self.pending.pop(entry.task_id, None)
            self._keep_answered(entry.task_id, entry)
            if self.meter.hook is not None:
                self.meter.tell(
                    TaskAnswered(task_id=entry.task_id, by=answer.by, error=answer.error)
                )
        entry.tell()
        return True

    def watch(self, entry: Entry, deadline: float | None) -> Wait:
        """Add a handle's wait, which ends by itself at a monotonic instant."""
        wait = Wait(entry)
        if entry.answer is None:
            if entry.grace is not None and not entry.waits:
                self.timers.cancel(entry.grace)
                entry.grace = None
            entry.waits.append(wait)
            if deadline is not None:
                wait.deadline = self.timers.call_at(deadline, partial(self._time_out, wait))
        return wait

    def abandon(self, wait: Wait) -> None:
        """End a handle's wait by its own wish."""
        self._end(wait, "The wait for the task {} was abandoned.")

    def _time_out(self, wait: Wait) -> None:
        self._end(wait, "No answer for the task {} came in time.")

    def _end(self, wait: Wait, what: str) -> None:
        entry = wait.entry
        if entry.answer is not None or wait.ended is not None:
            return
        if entry.task_id is None:
            message = f"{what.format('that the service had not accepted yet')}"
        else:
            message = (
                f"{what.format(entry.task_id)} The remote work goes on, as last heard "
                f"{entry.state!r}; session.task(task_id, …) waits again."
            )
        wait.ended = TaskTimeoutError(message, task_id=entry.task_id)
        if wait.deadline is not None:
            self.timers.cancel(wait.deadline)
        entry.waits.remove(wait)
        entry.tell()
        if not entry.waits and entry.task_id is not None:
            self._rest(entry)

    def _rest(self, entry: Entry) -> None:
        """Stop asking for a task nobody waits for; listen on for a while for whoever comes back."""
        self._drop_timers(entry)
        entry.grace = self.timers.call_at(
            self.clock.monotonic() + self.settings.answered_seconds, partial(self._forget, entry)
        )

    def _forget(self, entry: Entry) -> None:
        if not entry.waits and entry.task_id is not None:
            self.pending.pop(entry.task_id, None)

    def _drop_timers(self, entry: Entry) -> None:
        if entry.poll is not None and self.forget_poll is not None:
            self.forget_poll(entry.poll)
            entry.poll = None
        if entry.grace is not None:
            self.timers.cancel(entry.grace)
            entry.grace = None

    def _keep_answered(self, task_id: str, entry: Entry) -> None:
        self._answered[task_id] = (self.clock.monotonic(), entry)
        self._answered.move_to_end(task_id)
        while len(self._answered) > self.settings.answered_count:
            self._answered.popitem(last=False)
        self._expire_answered()

    def _expire_answered(self) -> None:
        oldest = self.clock.monotonic() - self.settings.answered_seconds
        while self._answered and next(iter(self._answered.values()))[0] < oldest:
            self._answered.popitem(last=False)

    def _park(self, task_id: str, notification: Notification, size: int) -> str:
        self._expire_parked()
        if task_id in self._parked:
            return "duplicate"
        if size > self.settings.parked_bytes:
            return "foreign"
        self._parked[task_id] = (self.clock.monotonic(), size, notification)
        self._parked_bytes += size
        while self._parked_bytes > self.settings.parked_bytes:
            self._drop_oldest_parked()
        return "parked"

    def _expire_parked(self) -> None:
        oldest = self.clock.monotonic() - self.settings.parked_seconds
        while self._parked and next(iter(self._parked.values()))[0] < oldest:
            self._drop_oldest_parked()

    def _drop_oldest_parked(self) -> None:
        task_id, (_, size, _) = self._parked.popitem(last=False)
        self._parked_bytes -= size
        self.count("foreign", task_id)


def _holds_analysis(notification: Notification) -> bool:
    return notification.data is not None and isinstance(notification.data.get("analysis"), dict)
