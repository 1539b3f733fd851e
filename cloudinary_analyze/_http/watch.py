"""The events of one call or poll. Made only for a session that has a hook (`on_event`)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import attrs

from cloudinary_analyze._clock import Clock
from cloudinary_analyze._http.transport import Answer, Body
from cloudinary_analyze._meter import Meter
from cloudinary_analyze._wire.protocol import Accepted
from cloudinary_analyze.errors import AnalyzeError, RemoteError
from cloudinary_analyze.events import (
    AttemptFinished,
    AttemptRetried,
    CallFinished,
    CallStarted,
    PollFinished,
)
from cloudinary_analyze.responses import Limit, Response, TaskStatus

T = TypeVar("T")


@attrs.define(eq=False, repr=False)
class Watch:
    """Follows one call or poll, and reports its attempts and its end to the hook.

    Attributes:
        meter: Calls the hook.
        clock: For the times.
        model: The model's name in URLs; ``None`` for a status poll.
        number: The number that identifies its events.
        begun: Monotonic instant when it began.
        queued_at: Monotonic instant when it began to queue. ``None`` while it does not queue.
        permit_wait: Seconds that it queued.
        attempts: Attempts that ended.
        status: HTTP status of the last attempt.
    """

    meter: Meter
    clock: Clock
    model: str | None = None
    number: int = attrs.field(init=False)
    begun: float = attrs.field(init=False)
    queued_at: float | None = attrs.field(default=None, init=False)
    permit_wait: float = attrs.field(default=0.0, init=False)
    attempts: int = attrs.field(default=0, init=False)
    status: int | None = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self.meter.watched += 1
        self.number = self.meter.watched
        self.begun = self.clock.monotonic()

    def start_call(self, model: str, *, as_task: bool, repeats: str | None) -> None:
        """Report the start of a call."""
        self.meter.emit(
            CallStarted(call=self.number, model=model, as_task=as_task, repeats=repeats)
        )

    def queue(self) -> None:
        """Note that the next attempt begins to queue."""
        if self.queued_at is None:
            self.queued_at = self.clock.monotonic()

    def _end_queueing(self) -> float:
        since, self.queued_at = self.queued_at, None
        waited = 0.0 if since is None else self.clock.monotonic() - since
        self.permit_wait += waited
        return waited

    async def attempt(
        self,
        sending: Awaitable[Answer],
        body: Body | None,
        read: Callable[[Answer], T],
        *,
        probe: bool,
    ) -> T:
        """Make an attempt and report its end.

        Args:
            sending: Sends the request and returns the response.
            body: What it sends; ``None`` for a poll.
            read: Reads the response, or raises.
            probe: Whether it is the only attempt in a pause.
        """
        waited = self._end_queueing()
        begun = self.clock.monotonic()
        self.attempts += 1
        self.status = None
        error: BaseException | None = None
        try:
            answer = await sending
            self.status = answer[0]
            return read(answer)
        except BaseException as raised:
            error = raised
            raise
        finally:
            if isinstance(error, AnalyzeError):
                ambiguous = error.ambiguous
            else:
                ambiguous = error is not None and body is not None and body.sent
            self.meter.emit(
                AttemptFinished(
                    call=self.number,
                    model=self.model,
                    attempt=self.attempts,
                    seconds=self.clock.monotonic() - begun,
                    permit_wait=waited,
                    status=self.status,
                    ambiguous=ambiguous and self.model is not None,
                    probe=probe,
                    error=error,
                )
            )

    def retry(self, error: AnalyzeError, wait: float) -> None:
        """Report that the last attempt will be repeated."""
        self.meter.emit(
            AttemptRetried(
                call=self.number,
                model=self.model,
                attempt=self.attempts,
                wait=wait,
                ambiguous=error.ambiguous,
                error=error,
            )
        )

    def finish_call(
        self,
        result: Response[Any] | Accepted | None,
        error: BaseException | None,
        *,
        denied: bool,
    ) -> None:
        """Report the end of a call."""
        self._end_queueing()
        limits: tuple[Limit, ...] = ()
        if isinstance(result, Response):
            limits = result.limits
        elif isinstance(error, RemoteError):
            limits = error.limits
        self.meter.emit(
            CallFinished(
                call=self.number,
                model=self.model or "",
                attempts=self.attempts,
                seconds=self.clock.monotonic() - self.begun,
                permit_wait=self.permit_wait,
                status=self.status,
                request_id=getattr(error if result is None else result, "request_id", None),
                task_id=result.task_id if isinstance(result, Accepted) else None,
                limits=limits,
                denied=denied,
                error=error,
            )
        )

    async def poll(self, task_id: str, polling: Awaitable[TaskStatus]) -> TaskStatus:
        """Wait for a poll and report its end."""
        state: str | None = None
        error: BaseException | None = None
        try:
            status = await polling
            state = status.state
            return status
        except BaseException as raised:
            error = raised
            raise
        finally:
            self._end_queueing()
            self.meter.emit(
                PollFinished(
                    call=self.number,
                    task_id=task_id,
                    attempts=self.attempts,
                    seconds=self.clock.monotonic() - self.begun,
                    permit_wait=self.permit_wait,
                    state=state,
                    error=error,
                )
            )
