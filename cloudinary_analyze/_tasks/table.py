"""One entry per task, many waits on it. Whoever brings the first answer wins; the rest is counted.

Entries come to know their task id with the 202. An answered entry can be taken up again by its id
for a while, and a notification that is here before its task is known waits for it, within bounds.
State changes are plain functions: no entry is ever seen half-way through one.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import attrs

from cloudinary_analyze._clock import Clock
from cloudinary_analyze._tasks.timers import Node, Timers
from cloudinary_analyze._wire.protocol import build_task_failure
from cloudinary_analyze.config import Settings
from cloudinary_analyze.errors import (
    ApiError,
    ResultNotDeliveredError,
    SessionClosedError,
    TaskFailedError,
    TaskTimeoutError,
)
from cloudinary_analyze.events import Meter, NotificationSeen, TaskAnswered
from cloudinary_analyze.requests import AnalyzeRequest
from cloudinary_analyze.responses import Notification, Response, has_analysis
from cloudinary_analyze.webhooks import parse_notification

SUBMITTING = "submitting"


@attrs.define(eq=False, repr=False, weakref_slot=False)
class Answer:
    """What ended a task: a response, a payload not decoded yet, or an error.

    Attributes:
        by: See `TaskAnswered`.
        data: ``{"entity": …, "analysis": …}`` of a notification; decoded by each handle.
        raw: Its envelope.
        response: Of a call.
        error: Why there is none of these.
    """

    by: str
    data: Mapping[str, Any] | None = None
    raw: Mapping[str, Any] | None = None
    response: Response[Any] | None = None
    error: Exception | None = None

    @property
    def is_lasting(self) -> bool:
        """Whether it is an outcome of the task, which whoever asks later is told too."""
        return self.by != "session" and not (self.by == "poll" and isinstance(self.error, ApiError))

    @property
    def is_guess(self) -> bool:
        """Whether it was given for want of a notification, which may still come."""
        error = self.error
        if isinstance(error, TaskFailedError):
            return not error.cause_known
        return isinstance(error, ResultNotDeliveredError)


@attrs.define(eq=False, repr=False, weakref_slot=False)
class Wait:
    """One handle's interest in an entry, with a deadline of its own.

    Attributes:
        entry: What it waits for; another one once two entries turned out to be one task.
        deadline: The timer that ends it.
        ended: Why it ended without an answer; the handle keeps to that.
        orphaned: Whether the handle was dropped, so that an error reaches nobody.
    """

    entry: Entry
    deadline: Node | None = None
    ended: TaskTimeoutError | None = None
    orphaned: bool = False


@attrs.define(eq=False, repr=False, weakref_slot=False)
class Entry:
    """What is known of one task.

    Attributes:
        request: What was asked; ``None`` if the task was taken up by its id.
        task_id: ``None`` until the service accepted it.
        state: The remote state as last heard of.
        answer: ``None`` while it is pending.
        since: Monotonic instant of its registration, or of its answer once it has one.
        waits: The handles that still wait.
        poll: Its place among the polls to come.
        grace: The timer that ends the wait for a notification that should have come.
        interval: Seconds before the last poll.
        misses: Polls that did not find the task.
        submission: The call that submits it, until that is over.
        repeated: Whether it is being repeated as a call.
    """

    request: AnalyzeRequest[Any] | None
    task_id: str | None = None
    state: str = SUBMITTING
    answer: Answer | None = None
    since: float = 0.0
    waits: list[Wait] = attrs.field(factory=list)
    poll: Node | None = None
    grace: Node | None = None
    interval: float = 0.0
    misses: int = 0
    submission: asyncio.Task[None] | None = None
    repeated: bool = False
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
        if self._waiters is None:
            return
        waiters, self._waiters = self._waiters, None
        for woken in waiters:
            if not woken.done():
                woken.set_result(None)


@attrs.define(eq=False, repr=False)
class Table:
    """The tasks of a session, and what arrived for tasks not known yet.

    Attributes:
        timers: The deadlines of waits, and the graces of entries.
        pending: Every task that was accepted and has no answer, by id.
        loop: The session's, on which alone its tasks can be awaited.
        forget_poll: Takes an entry from the polls to come; set by the poller.
        end_grace: Acts on a finished task whose notification did not come; set by the poller.
    """

    settings: Settings
    clock: Clock
    meter: Meter
    timers: Timers[Wait | Entry] = attrs.field(init=False)
    pending: dict[str, Entry] = attrs.field(factory=dict, init=False)
    loop: asyncio.AbstractEventLoop | None = None
    forget_poll: Callable[[Node], None] | None = None
    end_grace: Callable[[Entry], None] | None = None
    _answered: OrderedDict[str, Entry] = attrs.field(factory=OrderedDict)
    _looks_at: float = 0.0  # monotonic instant when the oldest of them may expire
    _parked: OrderedDict[str, tuple[float, bytes]] = attrs.field(factory=OrderedDict)
    _parked_bytes: int = 0

    def __attrs_post_init__(self) -> None:
        self.timers = Timers(self.clock, self._take_due)

    @property
    def parked(self) -> int:
        """How many notifications wait for their task to become known."""
        self._expire_parked()
        return len(self._parked)

    def find(self, task_id: str) -> Entry | None:
        """Return the entry of a task, pending or lately answered."""
        return self.pending.get(task_id) or self._find_answered(task_id)

    def _find_answered(self, task_id: str) -> Entry | None:
        self._expire_answered(self.clock.monotonic())
        return self._answered.get(task_id)

    def register(self, entry: Entry, task_id: str) -> Entry | None:
        """Take in an accepted task; what is parked for it answers it at once.

        Returns:
            The task's entry, if somebody waits for it and nobody asks for its status yet.
        """
        known = self.find(task_id)
        if known is not None:
            return self._merge(entry, known)
        entry.task_id = task_id
        entry.since = self.clock.monotonic()
        if entry.state == SUBMITTING:
            entry.state = "pending"
        self.pending[task_id] = entry
        self._expire_parked()
        parked = self._parked.pop(task_id, None)
        if parked is not None:
            body = parked[1]
            self._parked_bytes -= len(body)
            self.deliver(parse_notification(body), body)
        if entry.answer is None and not entry.waits:
            self._rest(entry)  # whoever submitted it stopped waiting meanwhile
        entry.tell()
        return entry if entry.answer is None and entry.waits else None

    def _merge(self, entry: Entry, known: Entry) -> Entry | None:
        """Let those who wait for an entry wait for another one of the same task."""
        resumed = not known.waits and bool(entry.waits) and known.answer is None
        known.request = known.request or entry.request
        if resumed:
            self._stop_resting(known)
        for wait in entry.waits:
            wait.entry = known
            if known.answer is None:
                known.waits.append(wait)
            else:
                self._settle(wait, known)
        entry.waits.clear()
        entry.tell()
        return known if resumed else None

    def deliver(self, notification: Notification, body: bytes) -> str:
        """Answer the task that a verified notification names; return the verdict.

        Args:
            notification: What arrived.
            body: What it was read from. Kept as it is while it is parked, as its bytes are what
                is bounded.
        """
        verdict = self._deliver(notification, body)
        self.count(verdict, notification.task_id)
        return verdict

    def _deliver(self, notification: Notification, body: bytes) -> str:
        task_id = notification.task_id
        if task_id is None:
            return "unrelated"
        failed = notification.failed
        data = notification.data
        if not failed and not has_analysis(data):
            return "malformed"
        entry = self.pending.get(task_id) or self._find_answered(task_id)
        if entry is None:
            return self._park(task_id, body)
        if entry.answer is not None:
            if not entry.answer.is_guess:
                return "duplicate"
            # handles keep to what they were told; whoever takes the task up later is told better
            entry = Entry(entry.request, task_id, entry.state)
            self._answered.move_to_end(task_id)
        if failed:
            error = build_task_failure(task_id, model=entry.model, notification=notification)
            self.answer(entry, Answer("notification", error=error), state="failed")
        else:
            answer = Answer("notification", data, notification.raw)
            self.answer(entry, answer, state="completed")
        return "resolved"

    def count(self, verdict: str, task_id: str | None = None) -> None:
        """Count a delivery that was looked at."""
        meter = self.meter
        meter.notifications[verdict] = meter.notifications.get(verdict, 0) + 1
        if meter.hook is not None:
            meter.tell(NotificationSeen(verdict=verdict, task_id=task_id))

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
            self._settle(wait, entry)
        entry.waits.clear()
        if entry.task_id is not None:
            self.pending.pop(entry.task_id, None)
            if answer.error is None or answer.is_lasting:
                self._keep_answered(entry.task_id, entry)
            if self.meter.hook is not None:
                self.meter.tell(
                    TaskAnswered(task_id=entry.task_id, by=answer.by, error=answer.error)
                )
        entry.tell()
        return True

    def _settle(self, wait: Wait, entry: Entry) -> None:
        """Take a wait's deadline away, as its entry has its answer."""
        if wait.deadline is not None:
            self.timers.discard(wait.deadline)
            wait.deadline = None
        if wait.orphaned and entry.answer is not None:
            report_error(entry, entry.answer.error)

    def watch(self, entry: Entry, deadline: float | None) -> Wait:
        """Add a handle's wait, which ends by itself at a monotonic instant."""
        wait = Wait(entry)
        if entry.answer is None:
            if not entry.waits:
                self._stop_resting(entry)
            if entry.waits:
                entry.waits.append(wait)
            else:
                entry.waits = [wait]  # of one, which takes less memory than a first append
            self.limit(wait, deadline)
        return wait

    def limit(self, wait: Wait, deadline: float | None) -> None:
        """Let a wait end at a monotonic instant."""
        if deadline is not None and wait.entry.answer is None and wait.ended is None:
            wait.deadline = self.timers.push(deadline, wait)

    def abandon(self, wait: Wait) -> None:
        """End a handle's wait by its own wish."""
        self._end(wait, "The wait for the task {} was abandoned.")

    def _take_due(self, item: Wait | Entry) -> None:
        if isinstance(item, Wait):
            self._end(item, "No answer for the task {} came in time.")
        elif not item.waits:
            self._forget(item)
        elif self.end_grace is not None:
            self.end_grace(item)

    def _end(self, wait: Wait, what: str) -> None:
        entry = wait.entry
        if entry.answer is not None or wait.ended is not None:
            return
        if entry.task_id is None:
            message = what.format("that the service had not accepted yet")
        else:
            message = (
                f"{what.format(entry.task_id)} The remote work goes on, as last heard "
                f"{entry.state!r}; session.task(task_id, …) waits again."
            )
        wait.ended = TaskTimeoutError(
            message, task_id=entry.task_id, ambiguous=entry.submission is not None
        )
        if wait.deadline is not None:
            self.timers.discard(wait.deadline)
            wait.deadline = None
        entry.waits.remove(wait)
        entry.tell()
        if wait.orphaned:
            report_error(entry, wait.ended)
        if not entry.waits and entry.task_id is not None:
            self._rest(entry)

    def _rest(self, entry: Entry) -> None:
        """Stop asking for a task nobody waits for; listen on for a while for whoever comes back."""
        self._drop_timers(entry)
        entry.grace = self.timers.push(
            self.clock.monotonic() + self.settings.answered_seconds, entry
        )

    def _stop_resting(self, entry: Entry) -> None:
        if entry.grace is not None:
            self.timers.discard(entry.grace)
            entry.grace = None

    def _forget(self, entry: Entry) -> None:
        if entry.task_id is not None:
            self.pending.pop(entry.task_id, None)

    def _drop_timers(self, entry: Entry) -> None:
        if entry.poll is not None and self.forget_poll is not None:
            self.forget_poll(entry.poll)
            entry.poll = None
        if entry.grace is not None:
            self.timers.discard(entry.grace)
            entry.grace = None

    def _keep_answered(self, task_id: str, entry: Entry) -> None:
        now = entry.since = self.clock.monotonic()
        self._answered[task_id] = entry
        if len(self._answered) > self.settings.answered_count:
            self._answered.popitem(last=False)
        if now > self._looks_at:
            self._expire_answered(now)

    def _expire_answered(self, now: float) -> None:
        answered = self._answered
        kept = self.settings.answered_seconds
        self._looks_at = now + kept
        while answered:
            expires_at = next(iter(answered.values())).since + kept
            if expires_at >= now:
                self._looks_at = expires_at
                break
            answered.popitem(last=False)

    def _park(self, task_id: str, body: bytes) -> str:
        self._expire_parked()
        if len(body) > self.settings.parked_bytes:
            return "foreign"
        if task_id not in self._parked:
            self._parked[task_id] = (self.clock.monotonic(), body)
            self._parked_bytes += len(body)
            while self._parked_bytes > self.settings.parked_bytes:
                self._drop_oldest_parked()
        return "parked"

    def _expire_parked(self) -> None:
        oldest = self.clock.monotonic() - self.settings.parked_seconds
        while self._parked and next(iter(self._parked.values()))[0] < oldest:
            self._drop_oldest_parked()

    def _drop_oldest_parked(self) -> None:
        task_id, (_, body) = self._parked.popitem(last=False)
        self._parked_bytes -= len(body)
        self.count("foreign", task_id)


def report_error(entry: Entry, error: Exception | None) -> None:
    """Tell the loop of an error that reaches nobody, as asyncio does for its futures."""
    if error is None or isinstance(error, SessionClosedError):
        return  # closing is the user's own doing, as cancelling is to asyncio
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        return
    task = f"the task {entry.task_id} ({entry.model})" if entry.task_id else f"a {entry.model}"
    loop.call_exception_handler(
        {"message": f"The error of {task} was never retrieved", "exception": error}
    )
