"""Calls: attempts, repeated as the policy says, each under a permit.

One loop serves analyze calls and status polls. The policy decides, `Permits` admits, `Transport`
sends, `_wire` reads. A permit covers exactly one attempt: it is given back before any wait, and
only after the attempt's outcome was reported.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from copy import copy
from functools import partial
from typing import TypeVar

import attrs
from yarl import URL

from cloudinary_analyze._cancellation import Sections, get_task
from cloudinary_analyze._clock import Clock, wake
from cloudinary_analyze._http.permits import Permits
from cloudinary_analyze._http.quota import Quota
from cloudinary_analyze._http.transport import Answer, Body, Transport
from cloudinary_analyze._http.watch import Watch
from cloudinary_analyze._policy import build_waits, decide_wait, is_throttle
from cloudinary_analyze._values import NotPicklable
from cloudinary_analyze._wire.protocol import (
    Accepted,
    build_analyze_url,
    build_body,
    build_task_url,
    read_accepted,
    read_error,
    read_response,
    read_task_status,
)
from cloudinary_analyze.config import Pacer, Settings
from cloudinary_analyze.errors import (
    AnalyzeError,
    ApiError,
    AuthenticationError,
    CallTimeoutError,
    ForeignCancellationError,
    InvalidRequestError,
    ResponseDecodeError,
    TransportError,
)
from cloudinary_analyze.events import Meter, SessionPaused
from cloudinary_analyze.requests import AnalyzeRequest
from cloudinary_analyze.responses import Response, TaskStatus

A = TypeVar("A")
T = TypeVar("T")


@attrs.define(eq=False, repr=False)
class _Call:
    """One call: what it sends, and how far it has come.

    Attributes:
        url: Where to.
        permits: What its attempts need.
        limit: Attempts at most.
        model: The model's wire name; ``None`` for a status poll.
        feature: The add-on feature that it is charged to.
        content: The JSON to POST; ``None``: a GET.
        deadline: Monotonic instant when it gives up.
        admit: Awaited with the permit held, immediately before the first attempt.
        denied: Whether `admit` did not return, so that the call does not count.
        attempts: Attempts begun.
        number: The number of the last of them among all attempts of the session.
        sending: The body of the attempt in flight.
        ambiguous: Whether an earlier attempt may have been charged.
        error: Why the last attempt failed.
        waits: Our own waits between attempts, once there was a failure.
        token: The number of the OAuth token that the last attempt was sent with.
        renewed: Whether a refusal has led to a new token already.
        probing: Whether this call tests if a used up quota was renewed.
        watch: Reports its events; ``None`` if the session has no hook.
    """

    url: URL
    permits: Permits
    limit: int
    model: str | None = None
    feature: str = ""
    content: bytes | None = None
    deadline: float | None = None
    admit: Callable[[], Awaitable[None]] | None = None
    denied: bool = False
    attempts: int = 0
    number: int = 0
    sending: Body | None = None
    ambiguous: bool = False
    error: AnalyzeError | None = None
    waits: Iterator[float] | None = None
    token: int = 0
    renewed: bool = False
    probing: bool = False
    watch: Watch | None = None


@attrs.define(eq=False, repr=False)
class Caller(NotPicklable):
    """Makes calls of one session.

    Attributes:
        base_url: ``scheme://host[:port]``.
        cloud_name: The product environment.
    """

    base_url: str
    cloud_name: str
    settings: Settings
    clock: Clock
    transport: Transport
    meter: Meter
    quota: Quota
    permits: Permits
    poll_permits: Permits
    _urls: dict[str, URL] = attrs.field(factory=dict, init=False)
    _sleepers: set[asyncio.Future[None]] = attrs.field(factory=set, init=False)
    _pacing: Sections = attrs.field(factory=Sections, init=False)
    _closed: AnalyzeError | None = attrs.field(default=None, init=False)

    async def analyze(
        self,
        request: AnalyzeRequest[A],
        *,
        deadline: float | None = None,
        as_task: bool = False,
        notification_url: str | None = None,
        admit: Callable[[], Awaitable[None]] | None = None,
        repeats: str | None = None,
    ) -> Response[A] | Accepted:
        """Make an analyze call and return the response, or the task that the service made of it.

        Args:
            request: What to analyse.
            deadline: Monotonic instant when the call gives up.
            as_task: Whether to ask for a task.
            notification_url: Where the service is to send the task's result.
            admit: Awaited with the permit held, immediately before the first attempt.
            repeats: The task that the call repeats.

        Raises:
            AnalyzeError: See `AnalyzeSession.analyze`.
            Exception: What `admit` raised. Nothing was sent.
        """
        model = request.model
        call = _Call(
            self._urls.get(model) or self._build_url(model),
            self.permits,
            self.settings.attempts,
            model,
            request.feature or model,
            build_body(request, as_task=as_task, notification_url=notification_url),
            deadline,
            admit,
        )
        meter = self.meter
        meter.calls += 1
        meter.in_flight += 1
        result: Response[A] | Accepted | None = None
        error: BaseException | None = None
        try:
            if meter.hook is not None:
                call.watch = Watch(meter, self.clock, model)
                call.watch.start_call(model, as_task=as_task, repeats=repeats)
            read = partial(self._read_analysis, request)
            if deadline is None:
                result = await self._repeat(call, read)
            else:
                result = await self._repeat_until(deadline, call, read)
            return result
        except BaseException as raised:
            error = raised
            if isinstance(raised, AnalyzeError):
                raised.ambiguous |= call.ambiguous
            raise
        finally:
            meter.in_flight -= 1
            if call.denied:
                meter.calls -= 1
            if call.watch is not None:
                call.watch.finish_call(result, error, denied=call.denied)

    async def get_task_status(self, task_id: str, *, attempts: int | None = None) -> TaskStatus:
        """Ask for a task's status, under the permits for polls.

        Args:
            task_id: The task.
            attempts: Attempts at most; default: the settings'.

        Raises:
            AnalyzeError: No status could be had.
        """
        call = _Call(
            URL(build_task_url(self.base_url, self.cloud_name, task_id), encoded=True),
            self.poll_permits,
            self.settings.attempts if attempts is None else attempts,
        )
        polling = self._repeat(call, partial(self._read_status, task_id))
        if self.meter.hook is None:
            return await polling
        call.watch = Watch(self.meter, self.clock)
        return await call.watch.poll(task_id, polling)

    def _build_url(self, model: str) -> URL:
        if not model:
            raise InvalidRequestError("AnalyzeRequest itself names no model; use a subclass.")
        url = URL(build_analyze_url(self.base_url, self.cloud_name, model), encoded=True)
        self._urls[model] = url
        return url

    async def _repeat_until(
        self, deadline: float, call: _Call, read: Callable[[_Call, Answer], T]
    ) -> T:
        begun = self.clock.monotonic()
        if deadline <= begun:
            raise CallTimeoutError("The time for the whole call was over before it was sent.")
        scope: asyncio.Timeout | None = None
        try:
            async with self.clock.timeout_at(deadline) as scope:
                return await self._repeat(call, read)
        except TimeoutError as error:
            if isinstance(error, AnalyzeError) or scope is None or not scope.expired():
                raise  # an attempt's, or the pacer's own
            how = f"{call.attempts} attempts" if call.attempts else "queueing for a permit"
            raise CallTimeoutError(
                f"No response arrived within the {deadline - begun:.1f} s for the whole call "
                f"({how}).",
                attempts=call.attempts,
                ambiguous=call.ambiguous or (call.sending is not None and call.sending.sent),
            ) from call.error

    async def _repeat(self, call: _Call, read: Callable[[_Call, Answer], T]) -> T:
        """Attempt a call until it has a response or an error that the policy calls final."""
        permits = call.permits
        quota = self.quota
        pacer = None if call.model is None else self.settings.pacer
        watch = call.watch
        while True:
            if watch is not None:
                watch.queue()
            if quota.breakers and call.model is not None and not call.probing:
                call.probing = quota.check(call.feature)
            if pacer is not None:
                await self._await_pacer(pacer)
            if permits.idle:
                permits.in_use += 1
            else:
                await permits.acquire()
            generation = permits.generation
            try:
                if call.admit is not None and not call.attempts:
                    call.denied = True
                    await call.admit()
                    call.denied = False
                self._begin(call)
                try:
                    sending = self.transport.send(call.url, call.sending)
                    if watch is None:
                        result = read(call, await sending)
                    else:
                        result = await watch.attempt(sending, call.sending, partial(read, call))
                except (ApiError, TransportError) as error:
                    wait = self._judge(call, error, generation)
                    refused = error
                    if wait is None and not self._may_renew(call, error):
                        raise
                except ResponseDecodeError as error:
                    error.model = call.model
                    error.ambiguous &= call.model is not None
                    raise
                else:
                    permits.succeed()
                    return result
            finally:
                permits.release()
            if wait is None:
                await self._renew_token(call, refused)
            else:
                await self._sleep(wait)

    def _may_renew(self, call: _Call, error: AnalyzeError) -> bool:
        """Whether a new OAuth token may help a call that failed, once."""
        refused = isinstance(error, AuthenticationError)
        return refused and self.transport.token is not None and not call.renewed

    async def _renew_token(self, call: _Call, error: AnalyzeError) -> None:
        """Wait for a newer OAuth token than the one that was refused.

        Raises:
            AuthenticationError: There is none; its cause says why.
            SessionClosedError: The session was closed meanwhile.
        """
        assert self.transport.token is not None
        call.renewed = True
        failure = await self.transport.token.renew(call.token)
        if self._closed is not None:
            raise copy(self._closed) from error
        if failure is not None:
            raise error from failure
        self._count_retry(call, error, 0.0)

    def _begin(self, call: _Call) -> None:
        """Check that an attempt may still be sent, and count it."""
        if call.deadline is not None and self.clock.monotonic() >= call.deadline:
            # the loop was late: the permit came before the timer, which is due by now
            raise CallTimeoutError(
                "The time for the whole call ran out while it was waiting.",
                attempts=call.attempts,
            ) from call.error
        if call.content is None:
            self.meter.polls += 1
        else:
            if self.quota.breakers and not call.probing:
                call.probing = self.quota.check(call.feature)  # it may have tripped meanwhile
            call.sending = Body(call.content)
            self.meter.attempts += 1
            call.number = self.meter.attempts
        call.attempts += 1
        if self.transport.token is not None:
            call.token = self.transport.token.number

    async def _await_pacer(self, pacer: Pacer) -> None:
        """Wait for the user's pacer; closing the session ends the wait."""
        task = get_task()
        cancelling = task.cancelling()
        self._pacing.inside[task] = 0.0
        cause: BaseException | None = None
        try:
            await pacer.acquire()
        except asyncio.CancelledError as error:
            interrupted = self._pacing.leave(task)
            if task.cancelling() > cancelling:
                raise
            if not interrupted:
                cause = error
        finally:
            self._pacing.leave(task)
        if self._closed is not None:
            raise copy(self._closed) from cause
        if cause is not None:
            raise ForeignCancellationError(
                "The pacer (Settings.pacer) raised CancelledError, but nothing cancelled this "
                "call. Nothing was sent."
            ) from cause

    def _read_analysis(
        self, request: AnalyzeRequest[A], call: _Call, answer: Answer
    ) -> Response[A] | Accepted:
        """Read the response to an analyze call.

        Raises:
            ApiError: It is an error.
            ResponseDecodeError: It cannot be read.
        """
        status, headers, body = answer
        call.sending = None
        if status == 200:
            response = read_response(request, body)
            if raw := response.raw.get("limits"):
                self.quota.note(call.feature, raw, number=call.number, newest=self.meter.attempts)
            elif limits := response.limits:  # in another place
                self.quota.learn(limits, number=call.number, newest=self.meter.attempts)
            result: Response[A] | Accepted = response
        elif status == 202:
            result = read_accepted(body, model=request.model)
        else:
            raise read_error(
                status,
                headers,
                body,
                now=self.clock.wall(),
                model=request.model,
                feature=request.feature,
            )
        if call.probing:
            self.quota.reset(call.feature, accepted=status == 202)
        return result

    def _read_status(self, task_id: str, _: _Call, answer: Answer) -> TaskStatus:
        """Read the response to a status poll; raises as `_read_analysis` does."""
        status, headers, body = answer
        if status == 200:
            return read_task_status(task_id, body)
        raise read_error(status, headers, body, now=self.clock.wall(), model=None, feature=None)

    def _judge(
        self, call: _Call, error: ApiError | TransportError, generation: int
    ) -> float | None:
        """Report a failed attempt to those whom it concerns, and decide on the call.

        Returns:
            The seconds until the next attempt; ``None`` if the error is final.

        Raises:
            SessionClosedError: The session was closed meanwhile.
        """
        if call.model is None:
            error.ambiguous = False  # asking for a status costs nothing
        call.sending = None
        call.error = error
        call.ambiguous |= error.ambiguous
        error.attempts = call.attempts
        if self._closed is not None:
            closed = copy(self._closed)
            closed.ambiguous = error.ambiguous
            raise closed from error
        if call.waits is None:
            call.waits = build_waits(self.settings)
        own_wait = next(call.waits)
        wait = None
        if call.attempts < call.limit:
            wait = decide_wait(
                error, call.attempts, self.settings, own_wait=own_wait, chance=random.random()
            )
        if is_throttle(error):
            self._throttle(call.permits, error, generation, own_wait if wait is None else wait)
        if call.model is not None and isinstance(error, ApiError):
            self.quota.take_failure(
                call.feature, error, number=call.number, newest=self.meter.attempts
            )
        if wait is not None:
            self._count_retry(call, error, wait)
        return wait

    def _count_retry(self, call: _Call, error: AnalyzeError, wait: float) -> None:
        self.meter.retries += 1
        self.meter.ambiguous_retries += error.ambiguous
        if call.watch is not None:
            call.watch.retry(error, wait)

    def _throttle(
        self, permits: Permits, error: AnalyzeError, generation: int, seconds: float
    ) -> None:
        if isinstance(error, ApiError) and error.retry_after is not None:
            seconds = max(seconds, min(error.retry_after, self.settings.max_server_wait))
        if permits.throttle(generation, seconds):
            self.meter.pauses += 1
            self.meter.tell(
                SessionPaused(
                    seconds=seconds, permits=permits.allowed, polls=permits is self.poll_permits
                )
            )

    async def _sleep(self, seconds: float) -> None:
        """Sleep on the session's clock; closing the session ends it with its error."""
        if self._closed is not None:
            raise copy(self._closed)
        woken = asyncio.get_running_loop().create_future()
        timer = self.clock.call_at(self.clock.monotonic() + seconds, partial(wake, woken))
        self._sleepers.add(woken)
        try:
            await woken
        finally:
            timer.cancel()
            self._sleepers.discard(woken)

    def close(self, error: AnalyzeError) -> None:
        """Fail everything that queues or sleeps, and all that comes later."""
        self._closed = error
        self.permits.close(error)
        self._pacing.interrupt_all()
        if self.transport.token is not None:
            self.transport.token.close()
        for woken in self._sleepers:
            if not woken.done():
                woken.set_exception(copy(error))

    def close_polls(self) -> None:
        """Fail the status polls that queue, and all that come later."""
        if self._closed is not None:
            self.poll_permits.close(self._closed)
