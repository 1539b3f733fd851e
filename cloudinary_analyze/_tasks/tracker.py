"""Perform the effects of the table of tasks: submit, poll, listen, resolve handles."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from time import perf_counter
from typing import TYPE_CHECKING, Any, TypeVar

import attrs

from cloudinary_analyze._clock import Clock, TimerHandle, wake
from cloudinary_analyze._meter import Meter
from cloudinary_analyze._tasks.entries import (
    Answer,
    Changed,
    Effect,
    Ended,
    Entry,
    Phase,
    Poll,
    Repeat,
    Wait,
    build_closed,
    build_event,
    note_quota,
)
from cloudinary_analyze._tasks.handle import AnalysisTask, complete, report
from cloudinary_analyze._tasks.poller import Poller
from cloudinary_analyze._tasks.table import Table
from cloudinary_analyze._tasks.timers import SLICE
from cloudinary_analyze._values import NotPicklable
from cloudinary_analyze._wire.protocol import Accepted
from cloudinary_analyze.config import Credentials, Settings
from cloudinary_analyze.errors import (
    BulkStoppedError,
    CallTimeoutError,
    NotificationSourceError,
    ResultNotDeliveredError,
    SessionClosedError,
    TaskTimeoutError,
)
from cloudinary_analyze.protocols import NotificationSource
from cloudinary_analyze.requests import AnalyzeRequest, Kind, name_model
from cloudinary_analyze.responses import Notification, Response, TaskStatus

if TYPE_CHECKING:
    from cloudinary_analyze._http.call import Owner
    from cloudinary_analyze._http.caller import Caller
    from cloudinary_analyze._tasks.listener import Listener

A = TypeVar("A")

Call = asyncio.Task[Response[Any] | Accepted]


@attrs.define(eq=False, repr=False)
class Tracker(NotPicklable):
    """The tasks of one session. Created on its event loop.

    Attributes:
        table: Every task that is pending or was answered recently.
        poller: Asks for the status of pending tasks.
        listener: Reads the notification source, if there is one.
    """

    caller: Caller
    settings: Settings
    clock: Clock
    meter: Meter
    table: Table
    loop: asyncio.AbstractEventLoop = attrs.field(factory=asyncio.get_running_loop, init=False)
    poller: Poller = attrs.field(init=False)
    listener: Listener | None = attrs.field(default=None, init=False)
    _calls: dict[Entry, Call] = attrs.field(factory=dict, init=False)
    _changes: dict[Wait, set[asyncio.Future[None]]] = attrs.field(factory=dict, init=False)
    _dropped: deque[tuple[Wait, bool]] = attrs.field(factory=deque, init=False)
    _ender: asyncio.Task[None] | None = attrs.field(default=None, init=False)
    _timer: TimerHandle | None = attrs.field(default=None, init=False)
    _timer_at: float = attrs.field(default=math.inf, init=False)

    def __attrs_post_init__(self) -> None:
        self.poller = Poller(
            self.caller, self.settings, self.clock, self.table.with_source, self._take_poll
        )

    @classmethod
    def start(
        cls, caller: Caller, credentials: Credentials, *, source: NotificationSource | None
    ) -> Tracker:
        """Create the parts and start listening."""
        table = Table(caller.settings, with_source=source is not None)
        tracker = cls(caller, caller.settings, caller.clock, caller.meter, table)
        if source is not None:
            from cloudinary_analyze._tasks.listener import Listener

            tracker.listener = Listener(
                source,
                credentials,
                caller.clock,
                caller.meter,
                deliver=tracker.deliver,
                pending=table.pending,
                on_end=tracker.end_source,
            )
            tracker.listener.start()
        return tracker

    # Handles.

    def submit(
        self,
        request: AnalyzeRequest[A],
        *,
        as_task: bool,
        deadline: float | None,
        owner: Owner | None = None,
    ) -> AnalysisTask[A]:
        """Send a request in the background and return its handle at once; see `Caller.analyze`."""
        wait = self.table.submit(request)
        wait.entry.owner = owner
        handle: AnalysisTask[A] = AnalysisTask(self, wait)
        end = self.table.build_end
        if as_task and end is not None:  # its result could never arrive, so it is not sent
            self._answer(wait.entry, Answer("session", end(None)))
            return handle
        call: Call = self.loop.create_task(
            self.caller.analyze(request, deadline=deadline, as_task=as_task, owner=owner)
        )
        self._calls[wait.entry] = call
        # A callback, because a task that is cancelled before its first step runs nothing else.
        call.add_done_callback(partial(self._take_submission, wait, deadline))
        return handle

    def _take_submission(self, wait: Wait, deadline: float | None, call: Call) -> None:
        entry = wait.entry
        self._calls.pop(entry, None)
        # Until the task is accepted, its deadline is the call's, which knows what was sent.
        try:
            answer = call.result()
        except CallTimeoutError as error:
            timeout = TaskTimeoutError(
                f"The service did not accept the task in time: {error.message}",
                ambiguous=error.ambiguous,
            )
            timeout.__cause__ = error
            self._answer(entry, Answer("session", timeout))
        except Exception as error:
            self._answer(entry, Answer("session", error), status="failed")
        except BaseException:
            closed = SessionClosedError(
                "The session was closed before the service accepted the task.", ambiguous=True
            )
            self._answer(entry, Answer("session", closed))
        else:
            if isinstance(answer, Accepted):
                self._emit_accepted(answer.task_id, entry.model)
                now = self.clock.monotonic()
                self._perform(self.table.accept(wait, answer.task_id, now, deadline=deadline))
                self._fetch(wait)
            else:
                self._answer(entry, Answer("call", response=answer), status="completed")

    def attach(
        self,
        task_id: str,
        kind: Kind[A],
        *,
        just_accepted: bool = False,
        trusted: bool = False,
        deadline: float | None = None,
        owner: Owner | None = None,
    ) -> AnalysisTask[A]:
        """Return a handle on an accepted task, known here or not.

        Args:
            task_id: The task.
            kind: The request, which can be repeated if the settings ask for that, or its class.
            just_accepted: The service accepted the task just now, as the response to a call.
            trusted: The id was recorded when the service accepted the task, so it is not made up.
            deadline: Monotonic instant when the wait ends.
            owner: Asked before the request is repeated as a call.
        """
        if just_accepted:
            self._emit_accepted(task_id, name_model(kind))
        wait, effects = self.table.attach(
            task_id,
            kind,
            self.clock.monotonic(),
            deadline=deadline,
            verified=just_accepted,
            trusted=trusted,
        )
        if owner is not None:
            wait.entry.owner = owner
        self._perform(effects)
        self._fetch(wait)
        return AnalysisTask(self, wait)

    def _fetch(self, wait: Wait) -> None:
        """Fetch notifications that the source received before the task was known here."""
        task_id = wait.entry.task_id
        if wait.answer is None and task_id is not None and self.listener is not None:
            self.listener.ask_for(task_id)

    def _emit_accepted(self, task_id: str, model: str) -> None:
        self.meter.accepted += 1
        if self.meter.hook is not None:
            from cloudinary_analyze.events import TaskAccepted

            self.meter.emit(TaskAccepted(task_id=task_id, model=model))

    def abandon(self, wait: Wait) -> None:
        """End a wait at its owner's request."""
        self._perform(self.table.abandon(wait, self.clock.monotonic()))

    def withdraw(self, wait: Wait) -> None:
        """End a wait, and the call that submits its task if that was not accepted yet."""
        entry = wait.entry
        self.abandon(wait)
        if entry.phase == Phase.SUBMITTING and (call := self._calls.get(entry)) is not None:
            call.cancel()

    def drop(self, wait: Wait, *, unobserved: bool) -> None:
        """Remove the wait of a handle that was dropped.

        The garbage collector calls it: in any thread, and between any two operations.
        """
        wait.future = None  # no code can retrieve an error that comes before the wait is removed
        self._dropped.append((wait, unobserved))
        if len(self._dropped) == 1:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self.loop.call_soon_threadsafe(self._take_dropped)

    def _take_dropped(self) -> None:
        until = perf_counter() + SLICE
        while self._dropped:
            if perf_counter() > until:
                self.loop.call_soon(self._take_dropped)
                return
            wait, unobserved = self._dropped[0]
            self._wake((wait,))
            answer = wait.answer
            if answer is None:
                now = self.clock.monotonic()
                self._perform(self.table.leave(wait, now, unobserved=unobserved))
            elif answer.error is not None and unobserved:
                report(answer.error, self.loop)  # answered after its handle was dropped
            self._dropped.popleft()  # last: `drop` schedules nothing meanwhile

    async def change(self, wait: Wait) -> None:
        """Wait until a task's id, status or answer changes. Cancelling is safe."""
        waiters = self._changes.get(wait)
        if waiters is None:
            waiters = self._changes[wait] = set()
        future = self.loop.create_future()
        waiters.add(future)
        try:
            await future
        except asyncio.CancelledError:
            waiters.discard(future)
            if not waiters and self._changes.get(wait) is waiters:
                del self._changes[wait]
            raise

    # Effects.

    def _perform(self, effects: Iterable[Effect]) -> None:
        for effect in effects:
            if type(effect) is Ended:
                self._end(effect)
            elif type(effect) is Poll:
                self.poller.schedule(effect.entry, at_once=effect.at_once)
            elif type(effect) is Changed:
                self._wake(effect.waits)
            elif type(effect) is Repeat:
                self._repeat(effect.entry, effect.request)
            else:
                self.meter.count(effect.verdict, effect.task_id)
        if self.table.wake_at < self._timer_at:
            self._set_timer(self.table.wake_at)

    def _end(self, ended: Ended) -> None:
        for wait in ended.waits:
            if (future := wait.future) is not None:
                wait.future = None
                complete(wait, future, ended.raw)
        if self._changes:
            self._wake(ended.waits)
        entry = ended.entry
        if entry is None:
            return
        error = ended.answer.error
        note_quota(self.caller.quota, entry, ended)
        if entry.unobserved and error is not None:
            report(error, self.loop)
        if self.meter.hook is not None and entry.task_id is not None:
            seconds = self.clock.monotonic() - entry.since
            self.meter.emit(build_event(ended, entry.task_id, seconds))

    def _wake(self, waits: Iterable[Wait]) -> None:
        for wait in waits:
            for future in self._changes.pop(wait, ()):
                wake(future)

    def _answer(self, entry: Entry, answer: Answer, *, status: str | None = None) -> None:
        self._perform(self.table.answer(entry, answer, self.clock.monotonic(), status=status))

    def _set_timer(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = when
        self._timer = self.clock.call_at(when, self._take_due)

    def _take_due(self) -> None:
        self._timer = None
        self._timer_at = -math.inf  # no timer is set meanwhile
        until = perf_counter() + SLICE
        try:
            while (effects := self.table.take_due(self.clock.monotonic())) is not None:
                self._perform(effects)
                if perf_counter() > until:
                    break
        finally:
            self._timer_at = math.inf
            self._perform(())

    # News.

    def deliver(self, notification: Notification, body: bytes) -> str:
        """Apply a verified notification and return the verdict."""
        verdict, effects = self.table.deliver(notification, body, self.clock.monotonic())
        self._perform(effects)
        return verdict

    def _take_poll(self, entry: Entry, outcome: TaskStatus | Exception) -> None:
        now = self.clock.monotonic()
        if isinstance(outcome, Exception):
            self._perform(self.table.take_error(entry, outcome, now))
        else:
            self._perform(self.table.take_status(entry, outcome, now))

    def _repeat(self, entry: Entry, request: AnalyzeRequest[Any]) -> None:
        """Repeat a task as a call, as the settings ask. It is charged again."""
        call: Call = self.loop.create_task(self._call_again(entry, request))
        self._calls[entry] = call
        call.add_done_callback(partial(self._take_repetition, entry))

    async def _call_again(
        self, entry: Entry, request: AnalyzeRequest[Any]
    ) -> Response[Any] | Accepted:
        owner = entry.owner
        if owner is not None:
            await owner.reserve_again()
        return await self.caller.analyze(request, owner=owner, repeats=entry.task_id)

    def _take_repetition(self, entry: Entry, call: Call) -> None:
        self._calls.pop(entry, None)
        try:
            answer = call.result()
        except SessionClosedError:
            self._answer(entry, Answer("session", build_closed(entry.task_id)))
        except BulkStoppedError as error:
            self._answer(entry, Answer("session", error))  # another handle may repeat it
        except Exception as error:
            self._answer(entry, Answer("analyze", error))
        except BaseException:
            self._answer(entry, Answer("session", build_closed(entry.task_id)))
        else:
            if isinstance(answer, Accepted):
                again = ResultNotDeliveredError(
                    f"The result of the task {entry.task_id} did not arrive. The service answered "
                    f"its repetition as a call with another task, {answer.task_id}.",
                    task_id=entry.task_id or "",
                )
                self._answer(entry, Answer("analyze", again))
            else:
                self._answer(entry, Answer("analyze", response=answer))

    def end_source(self, error: NotificationSourceError) -> None:
        """Fail pending tasks, because no more notifications can arrive."""

        def build(task_id: str | None) -> Exception:
            failure = NotificationSourceError(error.message, task_id=task_id)
            failure.__cause__ = error
            return failure

        self._end_pending(build)

    # The end.

    def _end_pending(self, build_error: Callable[[str | None], Exception]) -> None:
        """Fail pending tasks in slices, which continue even if the caller is cancelled."""
        self.table.end(build_error)
        if not self._end_slice() and (self._ender is None or self._ender.done()):
            self._ender = self.loop.create_task(self._end_rest())
            # A callback, because a task that is cancelled before its first step runs nothing else.
            self._ender.add_done_callback(self._end_at_once)

    def _end_slice(self) -> bool:
        """Fail pending tasks for a slice of time, and return whether none is left."""
        until = perf_counter() + SLICE
        while (effects := self.table.take_ending(self.clock.monotonic())) is not None:
            self._perform(effects)
            if perf_counter() > until:
                return False
        return True

    async def _end_rest(self) -> None:
        while True:
            await asyncio.sleep(0)
            if self._end_slice():
                return

    def _end_at_once(self, _: object) -> None:
        """Fail the remaining tasks, because the loop is closing."""
        while not self._end_slice():
            pass

    async def wait_ended(self) -> None:
        """Wait until everything that was pending has failed. Cancelling is safe."""
        if self._ender is not None and not self._ender.done():
            await asyncio.wait({self._ender})

    async def drain(self, seconds: float) -> None:
        """Wait until no handle waits for a task, up to a number of seconds."""
        with contextlib.suppress(TimeoutError):
            async with self.clock.timeout_at(self.clock.monotonic() + seconds):
                for entry in list(self.table.pending.values()):
                    while entry.waits:
                        await self.change(entry.waits[0])

    async def stop(self) -> None:
        """Stop listening and polling, and fail pending tasks, even when cancelled."""
        ending: set[asyncio.Task[Any]] = {*self.poller.stop(), *self._calls.values()}
        if self.listener is not None:
            ending.update(self.listener.stop())
        for call in self._calls.values():
            call.cancel()
        try:
            if ending:
                await asyncio.wait(ending)
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_at = -math.inf  # no timer is set any more
            self._end_pending(build_closed)
            self.table.clear()
        await self.wait_ended()
