"""Calls: attempts, repeated as the policy says, each under a permit.

A thin shell. `retry` decides, `gate` admits, `transport` sends, the wire room reads.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from copy import copy
from functools import partial
from typing import TypeVar

import attrs
from yarl import URL

from cloudinary_analyze._clock import Clock, wake
from cloudinary_analyze._http.permits import Permits
from cloudinary_analyze._http.quota import Quota
from cloudinary_analyze._http.transport import Answer, Transport
from cloudinary_analyze._policy import build_waits, decide_wait, is_throttle
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
from cloudinary_analyze.config import Settings
from cloudinary_analyze.errors import (
    AnalyzeError,
    ApiError,
    CallTimeoutError,
    InvalidRequestError,
    QuotaExceededError,
    ResponseDecodeError,
    TransportError,
)
from cloudinary_analyze.events import AttemptRetried, CallFinished, Meter, SessionPaused
from cloudinary_analyze.requests import AnalyzeRequest
from cloudinary_analyze.responses import Response, TaskStatus

A = TypeVar("A")


@attrs.define(eq=False, repr=False)
class _Trace:
    """How far a call has come, for the error when its time runs out."""

    attempts: int = 0
    on_the_wire: bool = False
    ambiguous: bool = False
    error: AnalyzeError | None = None


@attrs.define(eq=False, repr=False)
class Caller:
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
    gate: Permits
    poll_gate: Permits
    _urls: dict[str, URL] = attrs.field(factory=dict, init=False)
    _sleepers: set[asyncio.Future[None]] = attrs.field(factory=set, init=False)
    _closed: AnalyzeError | None = attrs.field(default=None, init=False)

    async def analyze(
        self,
        request: AnalyzeRequest[A],
        *,
        deadline: float | None = None,
        as_task: bool = False,
        notification_url: str | None = None,
    ) -> Response[A] | Accepted:
        """Make an analyze call, whatever the service answers it with.

        Args:
            request: What to analyse.
            deadline: Monotonic instant when the call gives up.
            as_task: Whether to ask for a task.
            notification_url: Where the service is to send the task's result.

        Raises:
            AnalyzeError: See `AnalyzeSession.analyze`.
        """
        body = build_body(request, as_task=as_task, notification_url=notification_url)
        meter = self.meter
        meter.calls += 1
        meter.in_flight += 1
        trace = _Trace()
        begun = self.clock.monotonic()
        error: BaseException | None = None
        try:
            if deadline is None:
                return await self._attempt_analyze(request, body, trace)
            return await self._analyze_until(deadline, request, body, trace)
        except BaseException as raised:
            error = raised
            if isinstance(raised, AnalyzeError):
                raised.ambiguous |= trace.ambiguous
            raise
        finally:
            meter.in_flight -= 1
            if meter.hook is not None:
                meter.tell(
                    CallFinished(
                        model=request.model,
                        seconds=self.clock.monotonic() - begun,
                        attempts=trace.attempts,
                        error=error,
                    )
                )

    async def _analyze_until(
        self, deadline: float, request: AnalyzeRequest[A], body: bytes, trace: _Trace
    ) -> Response[A] | Accepted:
        begun = self.clock.monotonic()
        if deadline <= begun:
            raise CallTimeoutError("The time for the whole call was over before it was sent.")
        scope: asyncio.Timeout | None = None
        try:
            async with self.clock.timeout_at(deadline) as scope:
                return await self._attempt_analyze(request, body, trace)
        except TimeoutError as error:
            if isinstance(error, AnalyzeError) or scope is None or not scope.expired():
                raise  # an attempt's, or the pacer's own
            how = f"{trace.attempts} attempts" if trace.attempts else "queueing for a permit"
            raise CallTimeoutError(
                f"No answer came within the {deadline - begun:.1f} s for the whole call ({how}).",
                attempts=trace.attempts,
                ambiguous=trace.on_the_wire or trace.ambiguous,
            ) from trace.error

    async def _attempt_analyze(
        self, request: AnalyzeRequest[A], body: bytes, trace: _Trace
    ) -> Response[A] | Accepted:
        gate = self.gate
        quota = self.quota
        pacer = self.settings.pacer
        model = request.model
        feature = request.feature or model
        url = self._urls.get(model)
        if url is None:
            if not model:
                raise InvalidRequestError("AnalyzeRequest itself names no model; use a subclass.")
            url = URL(build_analyze_url(self.base_url, self.cloud_name, model), encoded=True)
            self._urls[model] = url
        waits: Iterator[float] | None = None
        probing = False
        while True:
            if quota.breakers and not probing:
                probing = quota.check(feature)
            if pacer is not None:
                await pacer.acquire()
            if gate.idle:
                gate.in_use += 1
            else:
                await gate.acquire()
            generation = gate.generation
            error: AnalyzeError
            try:
                if quota.breakers and not probing:
                    probing = quota.check(feature)  # it may have tripped while this one queued
                trace.attempts += 1
                trace.on_the_wire = True
                self.meter.attempts += 1
                answer = await self.transport.post(url, body)
            except TransportError as raised:
                error = raised
            except ResponseDecodeError as raised:
                raised.model = model
                raise
            else:
                if answer[0] == 200:
                    gate.succeed()
                    response = read_response(request, answer[2])
                    if response.limits:
                        quota.learn(response.limits)
                    if probing:
                        quota.reset(feature)
                    return response
                if answer[0] == 202:
                    gate.succeed()
                    if probing:
                        quota.reset(feature)
                    return read_accepted(answer[2], model=model)
                error = self._read_error(answer, model=model, feature=request.feature)
            finally:
                gate.release()
            trace.on_the_wire = False
            trace.error = error
            trace.ambiguous |= error.ambiguous
            if waits is None:
                waits = build_waits(self.settings)
            wait = self._judge(error, trace.attempts, gate, generation, next(waits), model=model)
            if isinstance(error, ApiError):
                quota.learn(error.limits)
            if isinstance(error, QuotaExceededError):
                quota.trip(feature, error)
            if wait is None:
                raise error
            await self._sleep(wait)

    async def get_task_status(self, task_id: str, *, attempts: int | None = None) -> TaskStatus:
        """Ask for a task's status, under the permits for polls.

        Args:
            task_id: The task.
            attempts: Attempts at the most; default: the settings'.

        Raises:
            AnalyzeError: No status could be had.
        """
        attempts = self.settings.attempts if attempts is None else attempts
        url = URL(build_task_url(self.base_url, self.cloud_name, task_id), encoded=True)
        waits = build_waits(self.settings)
        made = 0
        while True:
            await self.poll_gate.acquire()
            generation = self.poll_gate.generation
            made += 1
            self.meter.polls += 1
            error: AnalyzeError
            try:
                answer = await self.transport.get(url)
            except TransportError as raised:
                raised.ambiguous = False  # asking again costs nothing
                error = raised
            else:
                if answer[0] == 200:
                    self.poll_gate.succeed()
                    return read_task_status(task_id, answer[2])
                error = self._read_error(answer, model=None, feature=None)
            finally:
                self.poll_gate.release()
            wait = self._judge(
                error,
                made,
                self.poll_gate,
                generation,
                next(waits),
                model=None,
                last=made >= attempts,
            )
            if wait is None:
                raise error
            await self._sleep(wait)

    def _read_error(self, answer: Answer, *, model: str | None, feature: str | None) -> ApiError:
        status, headers, body = answer
        return read_error(
            status, headers, body, now=self.clock.wall(), model=model, feature=feature
        )

    def _judge(
        self,
        error: AnalyzeError,
        attempt: int,
        gate: Permits,
        generation: int,
        own_wait: float,
        *,
        model: str | None,
        last: bool = False,
    ) -> float | None:
        """Decide on a failed attempt; pause everybody where the service asked for it."""
        if self._closed is not None:
            closed = copy(self._closed)
            closed.ambiguous = error.ambiguous
            raise closed from error
        if isinstance(error, ApiError | TransportError):
            error.attempts = attempt
        wait = None
        if not last:
            wait = decide_wait(
                error, attempt, self.settings, own_wait=own_wait, chance=random.random()
            )
        if is_throttle(error):
            self._throttle(error, gate, generation, own_wait if wait is None else wait)
        if wait is not None:
            self.meter.retries += 1
            self.meter.ambiguous_retries += error.ambiguous
            if self.meter.hook is not None:
                self.meter.tell(
                    AttemptRetried(
                        model=model,
                        attempt=attempt,
                        wait=wait,
                        ambiguous=error.ambiguous,
                        error=error,
                    )
                )
        return wait

    def _throttle(
        self, error: AnalyzeError, gate: Permits, generation: int, seconds: float
    ) -> None:
        if isinstance(error, ApiError) and error.retry_after is not None:
            seconds = max(seconds, min(error.retry_after, self.settings.max_server_wait))
        if gate.throttle(generation, seconds):
            self.meter.pauses += 1
            self.meter.tell(
                SessionPaused(seconds=seconds, permits=gate.allowed, polls=gate is self.poll_gate)
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
        self.gate.close(error)
        for woken in self._sleepers:
            if not woken.done():
                woken.set_exception(copy(error))

    def close_polls(self) -> None:
        """Fail the status polls that queue, and all that come later."""
        if self._closed is not None:
            self.poll_gate.close(self._closed)
