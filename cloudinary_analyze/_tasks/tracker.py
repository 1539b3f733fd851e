"""Brings tasks from their submission to their answer: wires table, poller and listener."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from cloudinary_analyze._clock import Clock
from cloudinary_analyze._tasks.handle import AnalysisTask
from cloudinary_analyze._tasks.listener import Listener
from cloudinary_analyze._tasks.poller import Poller
from cloudinary_analyze._tasks.table import Answer, Entry, Table, Wait
from cloudinary_analyze._wire.protocol import Accepted
from cloudinary_analyze.config import Credentials, Settings
from cloudinary_analyze.errors import (
    CallTimeoutError,
    NotificationSourceError,
    ResultNotDeliveredError,
    SessionClosedError,
    TaskTimeoutError,
)
from cloudinary_analyze.events import Meter, TaskAccepted
from cloudinary_analyze.protocols import NotificationSource
from cloudinary_analyze.requests import AnalyzeRequest
from cloudinary_analyze.responses import TaskStatus

if TYPE_CHECKING:
    from cloudinary_analyze._http.call import Caller

A = TypeVar("A")


@attrs.define(eq=False, repr=False)
class Tracker:
    """The tasks of one session. Made on its event loop.

    Attributes:
        table: Every task that is pending or was answered lately.
    """

    caller: Caller
    settings: Settings
    clock: Clock
    meter: Meter
    notification_url: str | None
    table: Table
    poller: Poller
    listener: Listener | None = None
    _background: set[asyncio.Task[None]] = attrs.field(factory=set)
    _source_error: NotificationSourceError | None = None

    @classmethod
    def start(
        cls,
        caller: Caller,
        credentials: Credentials,
        settings: Settings,
        *,
        clock: Clock,
        meter: Meter,
        source: NotificationSource | None,
        notification_url: str | None,
    ) -> Tracker:
        """Wire the parts together and begin to listen."""
        table = Table(settings, clock, meter, asyncio.get_running_loop())
        tracker: Tracker
        poller = Poller(
            table,
            caller,
            settings,
            clock,
            source is not None,
            lambda entry: tracker.take_missing(entry),  # noqa: PLW0108 -- made below
        )
        tracker = cls(caller, settings, clock, meter, notification_url, table, poller)
        if source is not None:
            tracker.listener = Listener(source, credentials, table, clock, tracker._end_source)
            tracker.listener.start()
        return tracker

    def submit(
        self, request: AnalyzeRequest[A], *, as_task: bool, deadline: float | None
    ) -> AnalysisTask[A]:
        """Send a request in the background and return its handle at once."""
        entry = Entry(request)
        wait = self.table.watch(entry, None)
        task = AnalysisTask(request.model, request.analysis_type, self, wait)
        if as_task and self._source_error is not None:
            self._fail_for_source(entry, self._source_error)  # paid for and never told: not sent
            return task
        work = self._submit(entry, wait, request, as_task=as_task, deadline=deadline)
        entry.submission = asyncio.create_task(work)
        self._keep(entry.submission)
        return task

    def withdraw(self, wait: Wait) -> None:
        """End a wait, and the call that submits its task if that was not accepted yet."""
        submission = wait.entry.submission
        self.table.abandon(wait)
        if submission is not None:
            submission.cancel()

    async def _submit(
        self,
        entry: Entry,
        wait: Wait,
        request: AnalyzeRequest[Any],
        *,
        as_task: bool,
        deadline: float | None,
    ) -> None:
        # until the task is accepted, its deadline is the call's, which knows what was sent
        try:
            answer = await self.caller.analyze(
                request,
                deadline=deadline,
                as_task=as_task,
                notification_url=self.notification_url,
            )
        except CallTimeoutError as error:
            timeout = TaskTimeoutError(
                f"The service did not accept the task in time: {error.message}",
                ambiguous=error.ambiguous,
            )
            timeout.__cause__ = error
            self.table.answer(entry, Answer("session", error=timeout))
        except Exception as error:
            self.table.answer(entry, Answer("session", error=error), state="failed")
        except asyncio.CancelledError:
            closed = SessionClosedError(
                "The session was closed before the service accepted the task.", ambiguous=True
            )
            self.table.answer(entry, Answer("session", error=closed))
            raise
        else:
            if isinstance(answer, Accepted):
                self._accept(entry, answer.task_id)
                self.table.limit(wait, deadline)
            else:
                self.table.answer(entry, Answer("call", response=answer), state="completed")
        finally:
            entry.submission = None

    def _accept(self, entry: Entry, task_id: str) -> None:
        if self.meter.hook is not None:
            self.meter.tell(TaskAccepted(task_id=task_id, model=entry.model))
        self._enter(entry, task_id, at_once=False)

    def _enter(self, entry: Entry, task_id: str, *, at_once: bool) -> None:
        known = self.table.register(entry, task_id)
        if known is not None:
            self._pursue(known, task_id, at_once=at_once)

    def _pursue(self, entry: Entry, task_id: str, *, at_once: bool) -> None:
        if self._source_error is not None:
            self._fail_for_source(entry, self._source_error)
            return
        self.poller.schedule(entry, at_once=at_once)
        if self.listener is not None:
            self.listener.ask_for([task_id])

    def attach(
        self,
        task_id: str,
        model: str,
        analysis_type: type[A],
        *,
        request: AnalyzeRequest[A] | None = None,
        just_accepted: bool = False,
        deadline: float | None = None,
    ) -> AnalysisTask[A]:
        """Return a handle on an accepted task, whether it is known here or not.

        Args:
            task_id: The task.
            model: The model's wire name, for messages.
            analysis_type: How to read the result.
            request: The request, if it is known: for messages, and to repeat it where the
                settings ask for that.
            just_accepted: The service accepted the task just now, as the response to a call.
            deadline: Monotonic instant when the wait ends.
        """
        wait = self._watch(task_id, request, just_accepted=just_accepted, deadline=deadline)
        if wait.entry.request is None:
            wait.entry.request = request
        return AnalysisTask(model, analysis_type, self, wait)

    def _watch(
        self,
        task_id: str,
        request: AnalyzeRequest[Any] | None,
        *,
        just_accepted: bool,
        deadline: float | None,
    ) -> Wait:
        entry = self.table.find(task_id)
        if entry is not None:
            resumed = entry.answer is None and not entry.waits
            wait = self.table.watch(entry, deadline)
            if resumed:
                self._pursue(entry, task_id, at_once=True)
            return wait
        entry = Entry(request, state="pending")
        wait = self.table.watch(entry, deadline)
        if just_accepted:
            self._accept(entry, task_id)
        else:
            self._enter(entry, task_id, at_once=True)  # it may well be finished by now
        return wait

    def take_missing(self, entry: Entry) -> None:
        """Act on a completed task whose result did not arrive."""
        assert entry.task_id is not None
        if entry.repeated:
            return
        if self.settings.on_missing_result == "analyze" and entry.request is not None:
            entry.repeated = True
            self._keep(asyncio.create_task(self._analyze_again(entry, entry.request)))
            return
        if self.settings.on_missing_result == "analyze":
            how = "Only who has the request can repeat it: session.task(task_id, request)."
        elif self.listener is None:
            how = (
                "Attach a notification source (AnalyzeSession(notifications=…, "
                "notification_url=…)), or submit with mode='call', or set "
                "Settings.on_missing_result='analyze'."
            )
        else:
            how = (
                f"No notification came within {self.settings.result_grace:.0f} s. Check that the "
                "service reaches the notification URL, and that its signature is accepted "
                "(session.stats.notifications)."
            )
        error = ResultNotDeliveredError(
            f"The task {entry.task_id} ({entry.model}) is completed, but its result never arrived "
            f"here: a status poll brings no result, a notification does. {how} "
            "The quota was charged.",
            task_id=entry.task_id,
            last_status=TaskStatus(entry.task_id, entry.state),
        )
        self.table.answer(entry, Answer("poll", error=error), state="completed")

    async def _analyze_again(self, entry: Entry, request: AnalyzeRequest[Any]) -> None:
        """Repeat a task as a call, which the user asked for and which is charged again."""
        try:
            answer = await self.caller.analyze(request)
        except SessionClosedError:
            self._close(entry)
            return
        except Exception as error:
            self.table.answer(entry, Answer("analyze", error=error))
            return
        if isinstance(answer, Accepted):
            again = ResultNotDeliveredError(
                f"The result of the task {entry.task_id} never arrived; repeated as a call, the "
                f"service answered with another task, {answer.task_id}.",
                task_id=entry.task_id or "",
            )
            self.table.answer(entry, Answer("analyze", error=again))
        else:
            self.table.answer(entry, Answer("analyze", response=answer))

    def _end_source(self, error: NotificationSourceError) -> None:
        self._source_error = error
        for entry in list(self.table.pending.values()):
            self._fail_for_source(entry, error)

    def _fail_for_source(self, entry: Entry, error: NotificationSourceError) -> None:
        failure = NotificationSourceError.for_task(entry.task_id, error.message)
        failure.__cause__ = error
        self.table.answer(entry, Answer("session", error=failure))

    def _keep(self, task: asyncio.Task[None]) -> None:
        self._background.add(task)
        task.add_done_callback(partial(_retrieve, self._background))

    async def drain(self, seconds: float) -> None:
        """Wait until nobody waits for a task any more, but not for longer than asked."""
        scope: asyncio.Timeout | None = None
        try:
            async with self.clock.timeout_at(self.clock.monotonic() + seconds) as scope:
                for entry in list(self.table.pending.values()):
                    while entry.waits:
                        await entry.change()
        except TimeoutError:
            if scope is None or not scope.expired():
                raise

    async def stop(self) -> None:
        """Stop listening and polling, and fail what is pending, even when cancelled."""
        ending: set[asyncio.Task[None]] = set(self.poller.stop())
        if self.listener is not None:
            ending.update(self.listener.stop())
        self.table.timers.clear()
        for task in self._background:
            task.cancel()
        ending |= self._background
        try:
            if ending:
                await asyncio.wait(ending)
        finally:
            for entry in list(self.table.pending.values()):
                self._close(entry)

    def _close(self, entry: Entry) -> None:
        error = SessionClosedError(
            f"The session was closed while the task {entry.task_id} was pending. The remote "
            "work goes on; session.task(task_id, …) takes it up again.",
            task_id=entry.task_id,
        )
        self.table.answer(entry, Answer("session", error=error))


def _retrieve(background: set[asyncio.Task[None]], task: asyncio.Task[None]) -> None:
    background.discard(task)
    if not task.cancelled():
        task.exception()
