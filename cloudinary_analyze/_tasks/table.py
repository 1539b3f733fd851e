"""The state machine of tasks: one entry per task id, any number of waits on it. Pure.

Every method takes the instant, changes the table, and returns effects. `tracker` performs them;
the table itself never calls, schedules or wakes anything. `entries` lists the legal states.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any, Final

import attrs

from cloudinary_analyze._tasks.entries import (
    AWAITED,
    LEFT,
    NOBODY,
    UNKNOWN,
    Answer,
    Changed,
    Effect,
    Ended,
    Entry,
    Phase,
    Poll,
    Repeat,
    Seen,
    Wait,
    build_limit_error,
    build_missing,
    build_not_found,
    build_timeout,
    corrects,
    read_answer,
)
from cloudinary_analyze._tasks.timers import DueHeap, Shelf
from cloudinary_analyze._wire import codec
from cloudinary_analyze._wire.protocol import build_task_failure, find_result, reports_progress
from cloudinary_analyze.config import Settings
from cloudinary_analyze.errors import AuthenticationError, NotFoundError, PermissionDeniedError
from cloudinary_analyze.requests import AnalyzeRequest, Kind, name_model
from cloudinary_analyze.responses import Notification, TaskStatus, find_string
from cloudinary_analyze.webhooks import parse_notification

FIRST_MINUTE: Final = 60.0  # a new task may be unknown to the service for a while
# ids from `AnalyzeSession.task` that the service has neither named nor found: about 10 MB, and the
# first polls of all of them take some minutes
MOST_UNCONFIRMED: Final = 10_000
REFUSALS: Final = (AuthenticationError, PermissionDeniedError)


@attrs.define(eq=False, repr=False)
class Table:
    """The tasks of a session, and notifications for tasks that are not known yet.

    Attributes:
        settings: For the bounds and graces.
        with_source: Whether notifications can arrive at all.
        pending: Every accepted task with a waiting handle.
        unconfirmed: The pending ids that may be made up; at most `MOST_UNCONFIRMED`.
        resting: Tasks without a waiting handle. They are not polled.
        answered: The answers of tasks, for handles that come later.
        parked: Notifications of tasks that are not known here yet.
        wake_at: The earliest instant when `take_due` may have something to do.
        build_end: Builds the error of a task once no result can arrive any more; see `end`.
        ending: The tasks that `take_ending` has yet to fail, the next one last.
    """

    settings: Settings
    with_source: bool
    pending: dict[str, Entry] = attrs.field(factory=dict, init=False)
    unconfirmed: set[str] = attrs.field(factory=set, init=False)
    resting: Shelf[Entry] = attrs.field(init=False)
    answered: Shelf[Answer] = attrs.field(init=False)
    parked: Shelf[bytes] = attrs.field(init=False)
    dues: DueHeap[Wait | Entry] = attrs.field(init=False)
    wake_at: float = attrs.field(default=math.inf, init=False)
    build_end: Callable[[str | None], Exception] | None = attrs.field(default=None, init=False)
    ending: list[Entry] = attrs.field(factory=list, init=False)

    def __attrs_post_init__(self) -> None:
        kept, count = self.settings.answered_seconds, self.settings.answered_count
        self.resting = Shelf(kept, count)
        self.answered = Shelf(kept, count, self.settings.answered_bytes)
        self.parked = Shelf(self.settings.parked_seconds, most_bytes=self.settings.parked_bytes)
        self.dues = DueHeap(attrgetter("due"))

    # Handles.

    def submit(self, request: AnalyzeRequest[Any]) -> Wait:
        """Add an entry that is about to be submitted, and return its wait."""
        return _add(Entry(request), request)

    def attach(
        self,
        task_id: str,
        kind: Kind[Any],
        now: float,
        *,
        deadline: float | None = None,
        verified: bool = False,
        trusted: bool = False,
    ) -> tuple[Wait, Sequence[Effect]]:
        """Add a wait on a task by its id, whether the task is known here or not.

        Args:
            task_id: The task.
            kind: The request, or its class if only that is known.
            now: Monotonic instant.
            deadline: Monotonic instant when the wait ends.
            verified: Whether the service named the task just now.
            trusted: Whether it named it once, so that the id is not made up.
        """
        request = None if isinstance(kind, type) else kind
        answer = self.answered.get(task_id)
        if answer is not None:
            return _build_wait(Entry(request, task_id, answer.status, Phase.OVER), kind, answer), ()
        entry = self.pending.get(task_id) or self.resting.get(task_id)
        trusted |= verified
        if entry is None:
            if not trusted and self.build_end is None and task_id not in self.parked:
                if len(self.unconfirmed) >= MOST_UNCONFIRMED:
                    refused = Entry(request, task_id, UNKNOWN, Phase.OVER)
                    answer = Answer("session", build_limit_error(task_id, MOST_UNCONFIRMED))
                    return _build_wait(refused, kind, answer), ()
                self.unconfirmed.add(task_id)
            entry = Entry(request, verified=verified)
            wait = _add(entry, kind)
            effects = self._register(entry, task_id, now, at_once=not verified)
        else:
            entry.request = entry.request or request
            entry.verified |= verified
            if trusted:
                self.unconfirmed.discard(task_id)
            entry.unobserved = False
            wait = _add(entry, kind)
            effects = self._resume(entry, now)
        self._limit(wait, deadline)
        return wait, effects

    def accept(
        self, wait: Wait, task_id: str, now: float, *, deadline: float | None
    ) -> Sequence[Effect]:
        """Register the task of a submission, and the deadline of its wait."""
        entry = wait.entry
        if entry.phase != Phase.SUBMITTING:
            return ()  # it was answered meanwhile
        entry.verified = True
        effects = self._register(entry, task_id, now, at_once=False)
        self._limit(wait, deadline)
        return effects

    def leave(
        self, wait: Wait, now: float, *, error: Exception | None = None, unobserved: bool = False
    ) -> Sequence[Effect]:
        """Remove a wait. It ends with the error; without an error, its handle was dropped."""
        if wait.answer is not None or wait.index == LEFT:
            return ()
        entry = wait.entry
        last = entry.waits.pop()
        if last is not wait:
            entry.waits[wait.index] = last
            last.index = wait.index
        wait.index = LEFT
        wait.due = None
        entry.unobserved |= unobserved
        if not entry.waits and entry.phase in AWAITED:
            self._rest(entry, now)
        if error is None:
            return ()
        wait.answer = Answer("session", error)
        return (Ended((wait,), wait.answer),)

    def abandon(self, wait: Wait, now: float) -> Sequence[Effect]:
        """End a wait at its owner's request."""
        error = build_timeout(wait.entry, "The wait for the task {} was abandoned.")
        return self.leave(wait, now, error=error)

    def _register(
        self, entry: Entry, task_id: str, now: float, *, at_once: bool
    ) -> Sequence[Effect]:
        known = self.pending.get(task_id) or self.resting.get(task_id)
        if known is not None:
            return self._merge(entry, known, now)
        entry.task_id = task_id
        entry.since = now
        entry.status = "pending"
        if (kept := self.answered.get(task_id)) is not None:
            return (Ended(_end_waits(entry, kept, kept.status), kept),)
        if self.build_end is not None:
            return self.answer(entry, Answer("session", self.build_end(task_id)), now)
        entry.phase = Phase.PENDING
        self.pending[task_id] = entry
        body = self.parked.pop(task_id)
        if body is not None:
            _, answered = self.deliver(parse_notification(body), body, now)
            return (*answered, Seen("resolved", task_id))
        if not entry.waits:
            self._rest(entry, now)
            return ()
        return (Changed(entry.waits), Poll(entry, at_once))

    def _merge(self, entry: Entry, known: Entry, now: float) -> Sequence[Effect]:
        """Move the waits of an entry to another one of the same task."""
        waits, entry.waits = entry.waits, NOBODY
        entry.phase = Phase.OVER
        known.request = known.request or entry.request
        if entry.verified:
            self._confirm(known)
        known.unobserved |= entry.unobserved
        for wait in waits:
            wait.entry = known
            wait.index = len(known.waits)
            known.waits.append(wait)
        return (Changed(waits), *self._resume(known, now))

    def _resume(self, entry: Entry, now: float) -> Sequence[Effect]:
        """Make a resting task pending again, if a handle waits for it."""
        task_id = entry.task_id
        if entry.phase != Phase.RESTING or not entry.waits or task_id is None:
            return ()
        if self.build_end is not None:
            return self.answer(entry, Answer("session", self.build_end(task_id)), now)
        self.resting.pop(task_id)
        self.pending[task_id] = entry
        if entry.due is None:
            entry.phase = Phase.PENDING
            return (Poll(entry, at_once=True),)
        entry.phase = Phase.GRACE
        return self._end_grace(entry, now)

    def _confirm(self, entry: Entry) -> None:
        """Note that the service named or found a task."""
        if not entry.verified:
            entry.verified = True
            self.unconfirmed.discard(entry.task_id or "")

    def _rest(self, entry: Entry, now: float) -> None:
        """Stop polling a task without a waiting handle. An id that may not exist is forgotten."""
        task_id = entry.task_id
        assert task_id is not None
        entry.phase = Phase.RESTING
        entry.poll_at = None
        self.pending.pop(task_id, None)
        if entry.verified:
            self.resting.put(task_id, entry, now)
            self._wake_at(now + self.resting.seconds)
        else:
            self.unconfirmed.discard(task_id)

    def _limit(self, wait: Wait, deadline: float | None) -> None:
        if deadline is None or wait.answer is not None or wait.index == LEFT:
            return
        wait.due = deadline
        self.dues.push(deadline, wait)
        self._wake_at(deadline)

    # Answers.

    def deliver(
        self, notification: Notification, body: bytes, now: float
    ) -> tuple[str, Sequence[Effect]]:
        """Answer the task that a verified notification names; return the verdict, too.

        Whatever its shape is, it answers a task with a waiting handle, unless it says that the
        task is still running.
        """
        task_id = notification.task_id
        if task_id is None:
            return "unrelated", ()
        entry = self.pending.get(task_id)
        if entry is None and (entry := self.resting.get(task_id)) is None:
            return self._deliver_later(task_id, notification, body, now)
        answer = read_answer(notification, body, task_id, entry)
        if answer is None:
            return "progress", self._note_progress(entry, notification)
        raw = notification.raw
        return "resolved", self.answer(entry, answer, now, status=answer.status, raw=raw)

    def _note_progress(self, entry: Entry, notification: Notification) -> Sequence[Effect]:
        """Learn that a task is known and still running. Only polls and results end it."""
        self._confirm(entry)
        entry.misses = 0
        state = find_string(notification.raw, "status")
        if state is None or entry.phase != Phase.PENDING or entry.status == state:
            return ()
        entry.status = state
        return (Changed(entry.waits),)

    def _deliver_later(
        self, task_id: str, notification: Notification, body: bytes, now: float
    ) -> tuple[str, Sequence[Effect]]:
        """Correct an answer that was a guess, or park a notification whose task is still unknown."""
        kept = self.answered.get(task_id)
        if kept is not None:
            answer = read_answer(notification, body, task_id, None)
            if answer is None or not kept.guess or answer.guess:
                return "duplicate", ()
            self._keep(task_id, answer, now)
            return "resolved", (Ended((), answer, Entry(None, task_id, phase=Phase.OVER)),)
        if reports_progress(notification):
            return "progress", ()  # if it was parked, it would replace the result
        parked = self.parked.get(task_id)
        if parked is not None and not corrects(notification, parked):
            return "parked", ()
        gone = self.parked.put(task_id, body, now, size=len(body))
        self._wake_at(now + self.parked.seconds)
        verdict = "foreign" if task_id in gone else "parked"
        return verdict, [Seen("foreign", key) for key in gone if key != task_id]

    def answer(
        self,
        entry: Entry,
        answer: Answer,
        now: float,
        *,
        status: str | None = None,
        raw: Mapping[str, Any] | None = None,
    ) -> Sequence[Effect]:
        """End a task, unless it has already ended.

        Args:
            entry: The task.
            answer: Its outcome.
            now: Monotonic instant.
            status: Its remote state, if that is known now.
            raw: The parsed body of the answer.
        """
        phase, task_id = entry.phase, entry.task_id
        if phase == Phase.OVER:
            return ()
        if task_id is not None:
            if phase == Phase.RESTING:
                self.resting.pop(task_id)
            else:
                self.pending.pop(task_id, None)
                if not entry.verified:
                    self.unconfirmed.discard(task_id)
            if answer.error is None or answer.lasting:
                self._keep(task_id, answer, now)
        return (Ended(_end_waits(entry, answer, status), answer, entry, raw),)

    def _keep(self, task_id: str, answer: Answer, now: float) -> None:
        body = answer.body
        if answer.response is not None:
            body = codec.dumps(answer.response.raw)
            answer = Answer(answer.by, body=body)
        self.answered.put(task_id, answer, now, size=len(body or b""))
        self._wake_at(now + self.answered.seconds)

    # Polls.

    def take_status(self, entry: Entry, status: TaskStatus, now: float) -> Sequence[Effect]:
        """Apply the status that a poll returned."""
        entry.misses = 0
        self._confirm(entry)
        phase, task_id = entry.phase, entry.task_id
        if phase == Phase.OVER or task_id is None:
            return ()
        result = find_result(status.raw)
        if result or (result is not None and status.finished):
            answer = Answer("poll", body=codec.dumps(status.raw))
            return self.answer(entry, answer, now, status=status.state, raw=status.raw)
        if status.state == "failed" and (report := Notification(task_id, status.raw)).error:
            error = build_task_failure(
                task_id, model=entry.model, notification=report, body=codec.dumps(status.raw)
            )
            return self.answer(entry, Answer("poll", error), now, status=status.state)
        effects: list[Effect] = []
        if entry.status != status.state:
            entry.status = status.state
            effects.append(Changed(entry.waits))
        if status.finished and entry.due is None:
            failed = status.state == "failed"
            grace = self.settings.failure_grace if failed else self.settings.result_grace
            entry.due = now + grace if self.with_source else now
            self.dues.push(entry.due, entry)
            self._wake_at(entry.due)
        if phase == Phase.PENDING and entry.due is not None:
            entry.phase = Phase.GRACE
            entry.poll_at = None
            effects += self._end_grace(entry, now)
        elif phase == Phase.PENDING:
            effects.append(Poll(entry))
        return effects

    def take_error(self, entry: Entry, error: Exception, now: float) -> Sequence[Effect]:
        """Handle a poll that returned no status. With a source, it never fails a task."""
        if entry.phase != Phase.PENDING:
            return ()
        if isinstance(error, REFUSALS) and not self.with_source:
            return self.answer(entry, Answer("poll", error), now)
        if not isinstance(error, NotFoundError):
            return (Poll(entry),)
        entry.misses += now - entry.since >= FIRST_MINUTE
        if entry.misses or not entry.verified:
            entry.status = UNKNOWN
        if entry.forgotten and not self.with_source:
            return self.answer(entry, Answer("poll", build_not_found(entry, error)), now)
        return (Changed(entry.waits), Poll(entry))

    def _end_grace(self, entry: Entry, now: float) -> Sequence[Effect]:
        """Handle a finished task whose notification did not arrive in time."""
        task_id, due, request = entry.task_id, entry.due, entry.request
        if entry.phase != Phase.GRACE or task_id is None or due is None or due > now:
            return ()
        if entry.status == "failed":
            error: Exception = build_task_failure(task_id, model=entry.model)
            return self.answer(entry, Answer("poll", error, guess=True), now)
        if self.settings.on_missing_result == "analyze" and request is not None:
            entry.phase = Phase.REPEATING
            return (Repeat(entry, request),)
        error = build_missing(entry, task_id, self.settings, with_source=self.with_source)
        return self.answer(entry, Answer("poll", error, guess=True), now, status="completed")

    # Time and the end.

    def take_due(self, now: float) -> Sequence[Effect] | None:
        """Handle one item that is due. Return ``None`` if there is none."""
        due = self.dues.next_due()
        if due is not None and due <= now:
            item = self.dues.pop()
            if isinstance(item, Entry):
                return self._end_grace(item, now)
            message = "No answer for the task {} arrived in time."
            return self.leave(item, now, error=build_timeout(item.entry, message))
        if (task_id := self.parked.expire(now)) is not None:
            return (Seen("foreign", task_id),)
        if self.resting.expire(now) is not None or self.answered.expire(now) is not None:
            return ()
        shelves = (self.parked, self.resting, self.answered)
        dues = (due, *(shelf.next_due() for shelf in shelves))
        self.wake_at = min((due for due in dues if due is not None), default=math.inf)
        return None

    def _wake_at(self, due: float) -> None:
        self.wake_at = min(self.wake_at, due)

    def end(self, build_error: Callable[[str | None], Exception]) -> None:
        """Fail what is pending, and whatever is submitted or attached from now on.

        `take_ending` returns the effects on what is pending, task by task. Until then each task may
        still be answered, joined or left.

        Args:
            build_error: Builds the error of a task from its id.
        """
        self.build_end = build_error
        self.ending = list(reversed(self.pending.values()))

    def take_ending(self, now: float) -> Sequence[Effect] | None:
        """Fail the next task that was pending at the `end`. Return ``None`` if none is left."""
        while self.ending:
            entry = self.ending.pop()
            if entry.phase in AWAITED and self.build_end is not None:
                error = self.build_end(entry.task_id)
                return self.answer(entry, Answer("session", error), now)
            # otherwise it is done, or no handle waits for it, or its repetition ends it
        return None

    def clear(self) -> None:
        """Forget everything without a waiting handle."""
        for shelf in (self.resting, self.answered, self.parked):
            shelf.clear()
        self.dues.clear()
        self.wake_at = math.inf


def _build_wait(entry: Entry, kind: Kind[Any], answer: Answer | None = None) -> Wait:
    return Wait(entry, name_model(kind), kind.analysis_type, answer)


def _add(entry: Entry, kind: Kind[Any]) -> Wait:
    wait = _build_wait(entry, kind)
    if entry.waits:
        wait.index = len(entry.waits)
        entry.waits.append(wait)
    else:
        entry.waits = [wait]  # a list of one takes less memory than a first append
    return wait


def _end_waits(entry: Entry, answer: Answer, status: str | None) -> list[Wait]:
    entry.phase = Phase.OVER
    entry.poll_at = entry.due = None
    if status is not None:
        entry.status = status
    waits, entry.waits = entry.waits, NOBODY
    for wait in waits:
        wait.answer = answer
        wait.due = None
    return waits
