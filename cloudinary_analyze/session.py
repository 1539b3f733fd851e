"""The public client: validates arguments and owns the session's lifetime."""

from __future__ import annotations

import asyncio
import contextlib
import math
import warnings
import weakref
from collections.abc import AsyncIterable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final, Literal, NoReturn, Self, TypeVar, overload

import attrs

from cloudinary_analyze import _policy
from cloudinary_analyze._arguments import (
    build_no_request_error,
    check_arguments,
    choose_base_url,
    read_notification_url,
    read_source,
)
from cloudinary_analyze._clock import SYSTEM_CLOCK, Clock
from cloudinary_analyze._http.quota import Quota
from cloudinary_analyze._meter import Meter, SessionStats
from cloudinary_analyze._stream import OutcomeStream
from cloudinary_analyze._tasks.handle import AnalysisTask, follow
from cloudinary_analyze._tasks.tracker import Tracker
from cloudinary_analyze._values import Closable, NotPicklable, URLObject
from cloudinary_analyze._wire import codec
from cloudinary_analyze._wire.protocol import Accepted
from cloudinary_analyze._work import Sender
from cloudinary_analyze.config import Credentials, Settings
from cloudinary_analyze.errors import (
    BulkStoppedError,
    ConfigurationError,
    InvalidRequestError,
    SessionAlreadyOpenError,
    SessionClosedError,
    SessionNotOpenError,
    WrongEventLoopError,
)
from cloudinary_analyze.outcomes import Failed, Outcome
from cloudinary_analyze.protocols import Ledger, NotificationSource
from cloudinary_analyze.requests import AnalyzeRequest, name_model
from cloudinary_analyze.responses import Delivery, Limit, Response, TaskStatus

if TYPE_CHECKING:
    import aiohttp

    from cloudinary_analyze._budget import Budget
    from cloudinary_analyze._http.caller import Caller
    from cloudinary_analyze._recording import Recording
    from cloudinary_analyze.events import EventHook
    from cloudinary_analyze.notifications.reading import Claim

__all__ = ["AnalyzeSession"]

Item = TypeVar("Item")
A = TypeVar("A")

CLOSE_PATIENCE: Final = 5.0
CALL_WINDOW: Final = 2  # times the permits: one half in flight, one half retrying or waiting
TASK_WINDOW: Final = 10_000

Mode = Literal["auto", "task", "call"]


def _import_what_sessions_need(*, watched: bool) -> None:
    """Import aiohttp, cattrs and backoff: with the first session, not with the package or a call.

    Many programs take only names from the package, and these imports take twice as long as all
    the rest. During a call they would stop the loop, or fail where files are short.
    """
    from cloudinary_analyze._http import caller, transport  # noqa: F401

    if watched:
        from cloudinary_analyze._http import watch  # noqa: F401

    codec.prepare()
    _policy.prepare()


@attrs.define(eq=False, repr=False)
class _Connection:
    """What `async with` opened.

    Attributes:
        loop: The event loop that everything belongs to.
        caller: Makes calls.
        tracker: Brings tasks to their results.
        claim: The right to read the notification source.
        closed: Done once the session is closed completely.
        closer: The task that closes it.
    """

    loop: asyncio.AbstractEventLoop
    caller: Caller
    tracker: Tracker
    claim: Claim | None
    closed: asyncio.Future[None]
    closer: asyncio.Task[Any] | None = None


class AnalyzeSession(NotPicklable, Closable):
    """A client of the Analyze API: one connection pool, one set of permits, one event loop.

    Create one for the life of the application and share it between tasks:

    ```python
    async with AnalyzeSession() as session:
        response = await session.analyze(Captioning("https://…/a.jpg"))
    ```

    Opening it with ``async with`` binds the running event loop; nothing is sent until the first
    request. All times are seconds. Every error is an `AnalyzeError`, except what your own input
    or callbacks raise.

    The first session imports aiohttp, which takes some tenths of a second. Create it while the
    application starts, not in the request that first needs it.

    Args:
        credentials: Cloud and keys. Default: `Credentials.from_environment`.
        settings: Limits, timeouts and retries. Default: `Settings()`.
        notifications: Where the results of tasks arrive: an ``asyncio.Queue[Delivery]`` that a
            receiver in this process fills, or a `NotificationSource`. It serves one session at
            a time.
        notification_url: Where the service sends the results of tasks: a string or a URL object.
            Default: the URL configured for the account.
        http: An aiohttp session of this event loop to send through. You close it, after this
            session. Its timeouts and ``raise_for_status`` are overridden. Excludes
            `Settings.proxy`: create it with the proxy instead, and without default headers that
            a proxy must not see, because aiohttp sends these to the proxy.
        on_event: Called with each event, see `cloudinary_analyze.events`. Must not block.
        clock: For tests: a `cloudinary_analyze.testing.ManualClock`.

    Raises:
        ConfigurationError: Invalid credentials, settings or arguments.

    Warns:
        ResourceWarning: It was dropped without being closed.
    """

    def __init__(
        self,
        credentials: Credentials | None = None,
        *,
        settings: Settings | None = None,
        notifications: asyncio.Queue[Delivery] | NotificationSource | None = None,
        notification_url: str | URLObject | None = None,
        http: aiohttp.ClientSession | None = None,
        on_event: EventHook | None = None,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        credentials = Credentials.from_environment() if credentials is None else credentials
        settings = Settings() if settings is None else settings
        check_arguments(credentials, settings, http, on_event)
        self._base_url = choose_base_url(credentials, settings)
        self._source = read_source(notifications, credentials)
        self._notification_url = read_notification_url(notification_url)
        _import_what_sessions_need(watched=on_event is not None)
        self._credentials = credentials
        self._settings = settings
        self._http = http
        self._clock = clock
        self._meter = Meter(on_event)
        self._quota = Quota(clock, settings.permits, self._meter)
        # not open: None, not closed; open: a connection, not closed; closing or closed: closed
        self._connection: _Connection | None = None
        self._closed = False
        self._warned_of_tasks = False
        self._streams: weakref.WeakSet[OutcomeStream[Any, Any]] = weakref.WeakSet()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open" if self._connection else "not open"
        return f"<AnalyzeSession of {self._credentials.cloud_name!r} at {self._base_url}, {state}>"

    async def __aenter__(self) -> Self:
        """Bind the running event loop and open the connection pool.

        Raises:
            SessionAlreadyOpenError: It is open.
            SessionClosedError: It was closed; a session opens once.
            ConfigurationError: Another session reads the notification source, the aiohttp session
                passed as ``http`` cannot be used, or ``oauth_token()`` returned no token.
        """
        if self._closed:
            raise SessionClosedError("A closed session cannot be opened again. Create a new one.")
        if self._connection is not None:
            raise SessionAlreadyOpenError("The session is already open.")
        from cloudinary_analyze._http.caller import Caller
        from cloudinary_analyze._http.transport import Transport

        loop = asyncio.get_running_loop()
        claim = None
        if self._source is not None:
            from cloudinary_analyze.notifications.reading import claim_source

            claim = claim_source(self._source)
        try:
            transport = Transport.open(
                self._credentials,
                self._settings,
                base_url=self._base_url,
                http=self._http,
                clock=self._clock,
            )
        except ConfigurationError:
            if claim is not None:
                claim.release()
            raise
        caller = Caller(
            self._base_url,
            self._credentials.cloud_name,
            self._settings,
            self._clock,
            transport,
            self._meter,
            self._quota,
            self._notification_url,
        )
        tracker = Tracker.start(caller, self._credentials, source=self._source)
        self._connection = _Connection(loop, caller, tracker, claim, loop.create_future())
        if transport.token is not None:
            try:
                if (failure := await transport.token.renew(0)) is not None:
                    raise failure
            except BaseException:
                await self.aclose()
                raise
        return self

    if not TYPE_CHECKING:  # for type checkers, `with` on a session is an error

        def __enter__(self) -> NoReturn:
            raise SessionNotOpenError(
                "AnalyzeSession is asynchronous: write `async with`, not `with`."
            )

        def __exit__(self, *_: object) -> None: ...

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        if getattr(self, "_connection", None) is not None and not self._closed:
            _warn(
                f"{self!r} was dropped without being closed. Use `async with` or `aclose()`.",
                ResourceWarning,
                source=self,
            )

    def _opened(self) -> _Connection:
        """Return what `async with` opened, if it may be used now and here."""
        connection = self._connection
        if self._closed:
            raise SessionClosedError("The session is closed. Create a new one.")
        if connection is None:
            raise SessionNotOpenError(
                "The session is not open. Use it inside `async with AnalyzeSession(…)`."
            )
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:  # a thread without one
            loop = None
        if loop is not connection.loop:
            raise WrongEventLoopError(
                "The session was opened on another event loop. Open one session per loop, inside "
                "the coroutine that asyncio.run() runs."
            )
        return connection

    async def analyze(
        self, request: AnalyzeRequest[A], *, timeout: float | None = None
    ) -> Response[A]:
        """Analyze an image and return the typed response.

        Retries transient failures, and follows a task if the service turns the call into one.
        Cancelling is safe at any time and closes the connection in use. A request that was already
        sent may still be charged.

        Source: ``POST /v2/analysis/{cloud}/analyze/{model}``.

        Args:
            request: The model, source and parameters.
            timeout: Seconds for the whole call, queueing and retries included. Default:
                `Settings.call_timeout`.

        Returns:
            The response. The type of ``response.analysis`` follows from the request.

        Raises:
            InvalidRequestError: The argument is not a request.
            ConfigurationError: ``timeout`` is not a number.
            ApiError: The service refused the request, or failed at every attempt; see subclasses.
            TransportError: No response arrived at any attempt. ``ambiguous`` says whether the
                request may have been charged.
            OutageError: The service failed or refused everything for too long.
            CallTimeoutError: ``timeout`` expired.
            ResponseDecodeError: The response cannot be read.
            TaskFailedError: The service turned the call into a task, and the task failed.
            TaskTimeoutError: The service turned the call into a task, and ``timeout`` expired.
            ResultNotDeliveredError: The service turned the call into a task, whose result did not
                arrive.
            SessionStateError: The session is not open, was closed, or belongs to another loop.
        """
        connection = self._opened()
        if not isinstance(request, AnalyzeRequest):
            raise build_no_request_error(request)
        deadline = self._build_deadline(timeout, self._settings.call_timeout)
        answer = await connection.caller.analyze(request, deadline=deadline)
        if type(answer) is Accepted:
            if deadline is None:
                deadline = self._build_deadline(None, self._settings.task_timeout)
            tracker = connection.tracker
            return await follow(
                tracker.attach(answer.task_id, request, just_accepted=True, deadline=deadline)
            )
        return answer  # type: ignore[return-value]  # a union that isinstance would narrow, slowly

    def submit(
        self, request: AnalyzeRequest[A], *, mode: Mode = "auto", timeout: float | None = None
    ) -> AnalysisTask[A]:
        """Send a request in the background and return its handle, a future, at once.

        Not a coroutine. The request waits for a permit in the background, and the handle raises its
        errors.

        ```python
        task = session.submit(Captioning("https://images.example/a.jpg"))
        print(await task.accepted())  # the task id, to store
        response = await task
        ```

        Source: ``POST /v2/analysis/{cloud}/analyze/{model}``, for tasks with ``async: true``.

        Args:
            request: The model, source and parameters.
            mode: ``"task"``: ask for a task; its result arrives as a notification, and polls watch
                its status. ``"call"``: make the synchronous call in the background. ``"auto"``:
                a task if the session has a notification source, otherwise a call, because without
                a source nothing delivers a task's result.
            timeout: Seconds for the whole wait: permit, retries, polls, delivery. Default:
                `Settings.task_timeout`.

        Raises:
            ConfigurationError: Invalid ``mode`` or ``timeout``.
            InvalidRequestError: Not a request.
            SessionStateError: The session is not open, was closed, or belongs to another loop.

        Warns:
            UserWarning: Once, on ``mode="task"`` without a notification source.
        """
        connection = self._opened()
        if not isinstance(request, AnalyzeRequest):
            raise build_no_request_error(request)
        as_task = self._asks_for_tasks(mode)
        deadline = self._build_deadline(timeout, self._settings.task_timeout)
        return connection.tracker.submit(request, as_task=as_task, deadline=deadline)

    def _asks_for_tasks(self, mode: Mode) -> bool:
        """Whether requests become tasks. Warn the caller once if their results cannot arrive."""
        if mode not in {"auto", "task", "call"}:
            raise ConfigurationError(f"`mode` must be 'auto', 'task' or 'call', not {mode!r}.")
        as_tasks = mode == "task" or (mode == "auto" and self._source is not None)
        if as_tasks and self._source is None and not self._warned_of_tasks:
            self._warned_of_tasks = True
            warnings.warn(
                "A task was submitted on a session without a notification source, so its result "
                "cannot arrive: polls bring its status only. Pass notifications=…, or use "
                "mode='call', or set Settings.on_missing_result='analyze' (which pays twice).",
                stacklevel=3,
            )
        return as_tasks

    def task(
        self,
        task_id: str,
        request_type: type[AnalyzeRequest[A]] | AnalyzeRequest[A],
        *,
        timeout: float | None = None,
    ) -> AnalysisTask[A]:
        """Return another handle on an accepted task: after a restart, or in another handler.

        Not a coroutine. Sends only status polls. A task that was answered recently
        (`Settings.answered_seconds`) is answered at once. A session waits for at most 10,000 ids
        that the service has not confirmed. The handle of one more ends with `TaskLimitError`.

        Source: ``GET /v2/analysis/{cloud}/tasks/{task_id}``, and the webhook.

        Args:
            task_id: From `AnalysisTask.accepted`.
            request_type: The request class (``Coco``), which determines how the result is read, or
                the request itself, which can also be repeated (`Settings.on_missing_result`).
            timeout: Seconds for the wait. Default: `Settings.task_timeout`.

        Raises:
            ConfigurationError: ``timeout`` is not a number.
            InvalidRequestError: Not a task id, or not a request class.
            SessionStateError: The session is not open, was closed, or belongs to another loop.
        """
        connection = self._opened()
        if not isinstance(task_id, str) or not task_id:
            raise InvalidRequestError(f"A task id is a string from the service, not {task_id!r}.")
        kind = request_type if isinstance(request_type, type) else type(request_type)
        if not issubclass(kind, AnalyzeRequest):
            raise build_no_request_error(request_type)
        if not name_model(request_type):
            raise InvalidRequestError(
                "Pass the class of a model (Coco), or for other models the request itself: "
                "session.task(task_id, OtherModel(name, source))."
            )
        deadline = self._build_deadline(timeout, self._settings.task_timeout)
        return connection.tracker.attach(task_id, request_type, deadline=deadline)

    def _build_deadline(self, timeout: float | None, default: float | None) -> float | None:
        timeout = default if timeout is None else timeout
        if timeout is None:
            return None
        if not isinstance(timeout, int | float) or math.isnan(timeout):
            raise ConfigurationError(f"`timeout` must be a number of seconds, not {timeout!r}.")
        return self._clock.monotonic() + timeout

    async def task_status(self, task_id: str) -> TaskStatus:
        """Return a task's status, which never carries the result.

        Retries transient failures. Costs no quota. Cancelling is safe.

        Source: ``GET /v2/analysis/{cloud}/tasks/{task_id}``.

        Args:
            task_id: From `AnalysisTask.accepted`.

        Raises:
            NotFoundError: The service does not know the task.
            AnalyzeError: The status could not be fetched; see `analyze`.
        """
        return await self._opened().caller.get_task_status(task_id)

    @overload
    def map(
        self,
        items: Iterable[AnalyzeRequest[A]] | AsyncIterable[AnalyzeRequest[A]],
        *,
        mode: Mode = "call",
        window: int | None = None,
        ordered: bool = False,
        ledger: Ledger | None = None,
        key: Callable[[AnalyzeRequest[A]], str] | None = None,
        budget: Budget | None = None,
    ) -> OutcomeStream[AnalyzeRequest[A], A]: ...

    @overload
    def map(
        self,
        items: Iterable[Item] | AsyncIterable[Item],
        to_request: Callable[[Item], AnalyzeRequest[A]],
        *,
        mode: Mode = "call",
        window: int | None = None,
        ordered: bool = False,
        ledger: Ledger | None = None,
        key: Callable[[Item], str] | None = None,
        budget: Budget | None = None,
    ) -> OutcomeStream[Item, A]: ...

    def map(
        self,
        items: Iterable[Any] | AsyncIterable[Any],
        to_request: Callable[[Any], AnalyzeRequest[Any]] | None = None,
        *,
        mode: Mode = "call",
        window: int | None = None,
        ordered: bool = False,
        ledger: Ledger | None = None,
        key: Callable[[Any], str] | None = None,
        budget: Budget | None = None,
    ) -> OutcomeStream[Any, Any]:
        """Analyze any number of items, lazily, and yield an outcome for each.

        ```python
        async with session.map(urls, Captioning) as outcomes:
            async for outcome in outcomes:
                if outcome.error is None:
                    print(outcome.item, outcome.response.analysis.caption)
        ```

        A failed item is a `Failed` outcome. It never raises out of the loop. Some errors stop more
        than their item. An exhausted quota stops its add-on feature. A missing add-on stops its
        model. Refused credentials, a server that asks for too long a wait, a closed session and a
        broken ledger stop everything. Later items of a stopped kind are not sent and fail with
        `BulkStoppedError`. The stream ends with `BulkStoppedError` at once if every request so far
        was of a stopped kind, and otherwise after ``window`` unsent items in a row. It also ends
        if none of the first 100 items makes a request. An exception from the input is raised after
        the outcomes of everything in flight.

        With a ledger, an outcome is yielded only once its record is durable, so a run can be
        killed at any moment and repeated. Recorded responses and permanent errors are yielded from
        the ledger (``outcome.restored``), submitted tasks are re-attached, and the rest is sent.
        Equal requests in flight share one call. Rate limits, server errors, timeouts and network
        errors are not recorded. While the ledger cannot be written, nothing more is sent. A ledger
        that fails stops the stream. Responses in flight are still yielded, marked as unrecorded.
        Leaving the stream waits up to 5 s for submissions in flight, to record their tasks.

        Not a coroutine. Cancelling an iteration is safe: it loses no outcome. Leaving ``async with``
        cancels the calls in flight. Requests that were already sent may still be charged.

        Source: ``POST /v2/analysis/{cloud}/analyze/{model}``, once per item.

        Args:
            items: Requests, or values that ``to_request`` builds requests from. An iterable or
                async iterable; it may be infinite.
            to_request: Builds a request from an item: ``Captioning``, or any function. An exception
                is that item's error. Default: the items are requests.
            mode: As for `submit`; the default makes calls.
            window: Maximum number of items in memory, from their pull until their outcome is
                handed over. Default: twice the permits for calls, 10,000 for tasks.
            ordered: Whether outcomes arrive in the order of the items, not as they complete.
            ledger: Where responses are recorded, such as ``SQLiteLedger(path)``. The stream opens
                it. Close it yourself, after the session. Default: nothing is recorded.
            key: Names an item in the ledger instead of its source, for URLs that change between
                runs (for example, signed URLs). Model and parameters are part of the key, too. A
                key names one source: a second source with the same key fails, in the window or
                if the ledger recorded another one. URLs are compared without known parameters of
                signatures (``X-Amz-*``, ``Expires``, ``token``, …) and Cloudinary's signature in
                the path, which may change between runs.
            budget: What the stream may spend. Once the calls are spent, the stream ends with
                `BudgetReachedError`. Once the units of a feature are spent, that feature stops as
                if its quota were exhausted. `OutcomeStream.spent` is what was spent.

        Raises:
            ConfigurationError: An argument is invalid, or they do not fit together.
            SessionStateError: The session is not open, was closed, or belongs to another loop.
            InvalidRequestError: ``items`` is a string, a mapping, a table, or not iterable.
        """
        tracker = self._opened().tracker
        as_tasks = self._asks_for_tasks(mode)
        if window is None:
            window = TASK_WINDOW if as_tasks else CALL_WINDOW * self._settings.permits
        if key is not None and ledger is None:
            raise ConfigurationError("`key` names items in a ledger: pass `ledger` too.")
        sender = Sender(as_tasks=as_tasks, tracker=tracker)
        recording = None if ledger is None else self._attach_ledger(ledger, sender)
        stream = OutcomeStream(
            items,
            to_request,
            sender.perform if recording is None else recording.perform,
            settings=self._settings,
            clock=self._clock,
            window=window,
            ordered=ordered,
            name=key,
            open=self._check_open if recording is None else recording.open,
            budget=budget,
        )
        self._streams.add(stream)
        return stream

    async def _check_open(self) -> None:
        self._opened()

    def _attach_ledger(self, ledger: Ledger, sender: Sender) -> Recording:
        if not isinstance(ledger, Ledger):
            raise ConfigurationError(
                f"`ledger` must be a Ledger, such as SQLiteLedger(path); not {ledger!r:.80}."
            )
        from cloudinary_analyze._recording import Recording

        return Recording(ledger=ledger, sender=sender)

    async def analyze_all(
        self, requests: Iterable[AnalyzeRequest[A]]
    ) -> list[Outcome[AnalyzeRequest[A], A]]:
        """Analyze some requests and return an outcome for each, in their order.

        For lists that fit into memory; use `map` for the others. A failed item does not raise.
        Requests that were not sent because the stream stopped fail with its `BulkStoppedError`.
        Cancelling cancels the calls in flight, and their outcomes are lost. Requests that were
        already sent may still be charged.

        Source: ``POST /v2/analysis/{cloud}/analyze/{model}``, once per request.

        Args:
            requests: The requests. Iterated once, at the start.

        Raises:
            SessionStateError: The session is not open, was closed, or belongs to another loop.
        """
        requests = list(requests)
        outcomes: list[Outcome[AnalyzeRequest[A], A]] = []
        try:
            async with self.map(requests, ordered=True) as stream:
                async for outcome in stream:
                    outcomes.append(outcome)  # noqa: PERF401 -- kept when the stream stops
        except BulkStoppedError as error:
            for index in range(len(outcomes), len(requests)):
                request = requests[index]
                outcomes.append(Failed(item=request, index=index, request=request, error=error))
        return outcomes

    @property
    def quota(self) -> Mapping[str, Limit]:
        """Add-on features and their newest `Limit`: the lowest remainder of the newest period seen.

        Source: ``limits`` of responses and notifications. Empty before the first of them.
        """
        return self._quota.limits

    @property
    def stats(self) -> SessionStats:
        """A snapshot of the counts since the session was created."""
        connection, counts = self._connection, self._meter.counts
        if connection is None:
            return SessionStats(**counts, permits_allowed=self._settings.permits)
        queue, table = connection.caller.attempts.queue, connection.tracker.table
        admission = queue.admission
        return SessionStats(
            **counts,
            permits_in_use=admission.in_use,
            permits_allowed=admission.allowed,
            pace=admission.pace.rate,
            probes=admission.probes,
            waiting=queue.waiting,
            pending=len(table.pending),
            parked=len(table.parked),
        )

    async def aclose(self, drain: float = 0.0) -> None:
        """Close the session. Idempotent; another close waits until the first has finished.

        Refuses new work, lets attempts in flight get their responses for up to 5 s (so that their
        task ids are known), and fails calls that queue or sleep. Waits for the results of accepted
        tasks if asked to, then fails what is pending with `SessionClosedError`, and closes the
        connection pool unless it was passed as ``http``. A cancelled close still closes
        everything, without waiting.

        Args:
            drain: Seconds to wait for the results of accepted tasks. Default: 0.

        Raises:
            WrongEventLoopError: The session is open on another event loop.
        """
        connection = self._connection
        if connection is None:
            self._closed = True
            return
        if connection.closed.done():
            await connection.tracker.wait_ended()  # it continues after a cancelled close
            return
        if asyncio.get_running_loop() is not connection.loop:
            raise WrongEventLoopError(
                "The session was opened on another event loop. Close it on that loop."
            )
        if self._closed:
            await self._wait_closed(connection)
            return
        self._closed = True
        connection.closer = asyncio.current_task()
        try:
            await self._close(connection, drain)
        finally:
            connection.closed.set_result(None)

    async def _wait_closed(self, connection: _Connection) -> None:
        """Wait for the close under way, unless it may be waiting for this task.

        It waits for tasks of ours that run code of the user (an input, a source), after it
        cancelled them. That code may close the session in its clean-up.
        """
        task = asyncio.current_task()
        if task is not None and task is not connection.closer and not task.cancelling():
            await asyncio.shield(connection.closed)

    async def _close(self, connection: _Connection, drain: float) -> None:
        caller, tracker = connection.caller, connection.tracker
        caller.attempts.close(
            SessionClosedError("The session was closed while this call was waiting.")
        )
        try:
            patient_until = self._clock.monotonic() + CLOSE_PATIENCE
            with contextlib.suppress(TimeoutError):
                async with self._clock.timeout_at(patient_until):
                    await caller.attempts.queue.wait_empty()
            for stream in list(self._streams):
                await stream.aclose()
            if drain > 0:
                await tracker.drain(drain)
        finally:
            caller.attempts.close_polls()
            try:
                await tracker.stop()
            finally:
                if connection.claim is not None:
                    connection.claim.release()
                await caller.transport.close()
