"""Calls: what to send and how to read the response. `Attempts` sends and repeats."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, TypeVar

import attrs
from yarl import URL

from cloudinary_analyze._clock import Clock
from cloudinary_analyze._http.attempts import Attempts
from cloudinary_analyze._http.call import Call, Owner
from cloudinary_analyze._http.quota import Quota
from cloudinary_analyze._http.transport import Answer, Transport
from cloudinary_analyze._meter import Meter
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
from cloudinary_analyze.config import Settings
from cloudinary_analyze.errors import AnalyzeError, InvalidRequestError, ResponseDecodeError
from cloudinary_analyze.requests import AnalyzeRequest
from cloudinary_analyze.responses import Response, TaskStatus

if TYPE_CHECKING:
    from cloudinary_analyze._http.watch import Watch

A = TypeVar("A")
T = TypeVar("T")


@attrs.define(eq=False, repr=False)
class Caller(NotPicklable):
    """Makes calls of one session.

    Attributes:
        base_url: ``scheme://host[:port]``.
        cloud_name: The product environment.
        notification_url: Where the service is to send the results of tasks.
        attempts: Repeats attempts until there is a response or a final error.
    """

    base_url: str
    cloud_name: str
    settings: Settings
    clock: Clock
    transport: Transport
    meter: Meter
    quota: Quota
    notification_url: str | None
    attempts: Attempts = attrs.field(init=False)
    _urls: dict[str, URL] = attrs.field(factory=dict, init=False)

    def __attrs_post_init__(self) -> None:
        self.attempts = Attempts(self.settings, self.clock, self.transport, self.meter, self.quota)

    async def analyze(
        self,
        request: AnalyzeRequest[A],
        *,
        deadline: float | None = None,
        as_task: bool = False,
        owner: Owner | None = None,
        repeats: str | None = None,
    ) -> Response[A] | Accepted:
        """Make an analyze call. Return the response, or the task if the service turns it into one.

        Args:
            request: The request.
            deadline: Monotonic instant when the call gives up.
            as_task: Whether to ask for a task.
            owner: The item of bulk work that the call belongs to. Without one it is interactive,
                unless it repeats a task.
            repeats: The task that the call repeats.

        Raises:
            AnalyzeError: See `AnalyzeSession.analyze`.
            Exception: The error of `owner` or its claim. Nothing was sent.
        """
        model = request.model
        url = self._urls.get(model)  # no `or`: the truth of a URL is slow to compute
        begun = self.clock.monotonic()
        call = Call(
            self._build_url(model) if url is None else url,
            self.attempts.queue,
            self.settings.attempts,
            begun,
            self.attempts.own_patience,
            model,
            request.feature or model,
            build_body(request, as_task=as_task, notification_url=self.notification_url),
            deadline,
            owner is None and repeats is None,
            owner,
        )
        meter = self.meter
        meter.calls += 1
        meter.in_flight += 1
        result: Response[A] | Accepted | None = None
        error: BaseException | None = None
        try:
            if meter.hook is not None:
                call.watch = self._watch(model)
                call.watch.start_call(model, as_task=as_task, repeats=repeats)
            read = partial(self._read_analysis, request)
            if deadline is None:
                result = await self.attempts.repeat(call, read)
            else:
                result = await self.attempts.repeat_until(deadline, call, read)
            return result
        except BaseException as raised:
            error = raised
            meter.ambiguous_failures += _may_be_charged(call, raised)
            if isinstance(raised, AnalyzeError):
                raised.ambiguous |= call.ambiguous
            raise
        finally:
            meter.in_flight -= 1
            if call.unsent:
                meter.calls -= 1
            if call.watch is not None:
                call.watch.finish_call(result, error, denied=call.unsent)

    async def get_task_status(self, task_id: str, *, attempts: int | None = None) -> TaskStatus:
        """Ask for a task's status, under the permits for polls.

        Args:
            task_id: The task.
            attempts: The maximum number of attempts of a poll in the background. Default: that of
                the settings, for an interactive poll.

        Raises:
            AnalyzeError: No attempt returned a status.
        """
        call = Call(
            URL(build_task_url(self.base_url, self.cloud_name, task_id), encoded=True),
            self.attempts.poll_queue,
            self.settings.attempts if attempts is None else attempts,
            self.clock.monotonic(),
            self.attempts.own_patience,
            urgent=attempts is None,
        )
        polling = self.attempts.repeat(call, partial(self._read_status, task_id))
        if self.meter.hook is None:
            return await polling
        call.watch = self._watch()
        return await call.watch.poll(task_id, polling)

    def _watch(self, model: str | None = None) -> Watch:
        from cloudinary_analyze._http.watch import Watch

        return Watch(self.meter, self.clock, model)

    def _build_url(self, model: str) -> URL:
        if not model:
            raise InvalidRequestError("AnalyzeRequest itself names no model; use a subclass.")
        url = URL(build_analyze_url(self.base_url, self.cloud_name, model), encoded=True)
        self._urls[model] = url
        return url

    def _read_analysis(
        self, request: AnalyzeRequest[A], call: Call, answer: Answer
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
                self.quota.note(call.feature, raw, number=call.number)
            elif limits := response.limits:  # in another place
                self.quota.learn(limits, number=call.number)
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

    def _read_status(self, task_id: str, _: Call, answer: Answer) -> TaskStatus:
        """Read the response to a status poll. Raises the same errors as `_read_analysis`."""
        status, headers, body = answer
        if status == 200:
            return read_task_status(task_id, body)
        raise read_error(status, headers, body, now=self.clock.wall(), model=None, feature=None)


def _may_be_charged(call: Call, error: BaseException) -> bool:
    """Whether the last attempt of a call that ended with an error may have been charged."""
    if isinstance(error, ResponseDecodeError):
        return error.ambiguous
    if call.sending is not None:
        return call.sending.sent  # the call was cut off while the attempt was in flight
    return call.error is not None and call.error.ambiguous
