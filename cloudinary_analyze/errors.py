"""The whole error tree. Everything that this package raises on purpose is an `AnalyzeError`.

Three families are never mixed: the call did not get through (`TransportError`,
`ResponseDecodeError`), the service said no (`ApiError`, `TaskFailedError`), and our own wait
ended (`CallTimeoutError`, `TaskTimeoutError`, `ResultNotDeliveredError`). Errors also inherit the
fitting built-in, survive pickling, and hold no secret.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Self

from cloudinary_analyze.responses import Limit, TaskStatus

SHOWN_BODY: Final = 200  # characters of a raw body that `str(error)` shows


class AnalyzeError(Exception):
    """The root of all errors of this package.

    Attributes:
        message: What happened, what it means, and what to do, as a sentence.
        ambiguous: Whether the service may have accepted (and charged) the request although no
            answer arrived. Repeating it may cost quota again.
    """

    ambiguous: bool = False

    def __init__(self, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.message = message
        for name, value in fields.items():
            setattr(self, name, value)

    def __str__(self) -> str:
        if self.ambiguous:
            return f"{self.message} The request may have been accepted, and charged."
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # keyword-only constructors do not survive the default protocol
        return _rebuild_error, (type(self), self.args), self.__dict__


def _rebuild_error(kind: type[AnalyzeError], args: tuple[Any, ...]) -> AnalyzeError:
    error = kind.__new__(kind, *args)
    error.args = args
    return error


class ConfigurationError(AnalyzeError, ValueError):
    """Credentials, settings or the environment cannot work. Nothing was sent."""


class InvalidRequestError(AnalyzeError, ValueError):
    """A request cannot be right as it was built. Nothing was sent."""


class ForeignCancellationError(AnalyzeError):
    """Code that was passed in raised `asyncio.CancelledError`, but nobody cancelled this work.

    For example, an input or a pacer awaited a future that was cancelled. ``__cause__`` is the
    original error.
    """


class SessionStateError(AnalyzeError, RuntimeError):
    """The session cannot be used now, or not from here. See the subclasses."""


class SessionNotOpenError(SessionStateError):
    """The session was used before ``async with`` opened it."""


class SessionAlreadyOpenError(SessionStateError):
    """A session that is open was opened again."""


class WrongEventLoopError(SessionStateError):
    """The session, or a handle of it, was used outside the event loop that opened the session."""


class SessionClosedError(SessionStateError):
    """The session was closed: before this call, or while this task was pending.

    Attributes:
        task_id: The task that was pending; `AnalyzeSession.task` takes it up again. ``None`` if
            there was none yet.
    """

    task_id: str | None = None


class TransportError(AnalyzeError, ConnectionError):
    """No answer came over the network, after every attempt that the settings allow.

    Attributes:
        attempts: How many attempts were made.
        ambiguous: Whether an attempt was sent and left unanswered.
        permanent: Whether another attempt cannot fare better (a certificate is refused, say).
    """

    attempts: int = 1
    permanent: bool = False


class AttemptTimeoutError(TransportError, TimeoutError):
    """The last attempt's connect or read timeout ran out (real seconds)."""


class CallTimeoutError(AnalyzeError, TimeoutError):
    """The time for the whole call (``timeout=``) ran out; ``__cause__`` is the last failure.

    Attributes:
        attempts: How many attempts were made; 0 if the call was still queueing for a permit.
    """

    attempts: int = 0


class ApiError(AnalyzeError):
    """The service answered with an error.

    Attributes:
        status: HTTP status.
        code: The service's code, such as ``MA_00003``, if there was one.
        category: ``user_error``, ``auth_error``, ``server_error``, ``rate_limit_error``, or
            whatever else was sent.
        api_message: The service's own message.
        details: The error's free object; the useful text is often only here.
        request_id: For the vendor's support.
        retry_after: Seconds that the server asked to wait, if it did.
        limits: The quotas that the answer told of.
        raw_body: The whole body as received.
        model: The model that was asked; ``None`` outside of analyze calls.
        attempts: How many attempts were made.
    """

    status: int = 0
    code: str | None = None
    category: str | None = None
    api_message: str | None = None
    details: Mapping[str, Any] | None = None
    request_id: str | None = None
    retry_after: float | None = None
    limits: tuple[Limit, ...] = ()
    raw_body: bytes = b""
    model: str | None = None
    attempts: int = 1


class BadRequestError(ApiError, ValueError):
    """400, 413, 415, 422 and other refusals of what was asked: the same call never succeeds."""


class AuthenticationError(ApiError, PermissionError):
    """401: the credentials are not those of this cloud."""


class PermissionDeniedError(ApiError, PermissionError):
    """403: usually an add-on without subscription.

    Attributes:
        feature: The add-on feature that is not subscribed, if the service named it.
    """

    feature: str | None = None


class NotFoundError(ApiError, LookupError):
    """404: no such task, asset, cloud or model."""


class RateLimitedError(ApiError):
    """429 or 420: too fast. Retried with a pause of the whole session before it is raised."""


class QuotaExceededError(RateLimitedError):
    """429 ``MA_00008``: the add-on's quota is used up. Not retried; nothing was analysed.

    Attributes:
        feature: The feature whose quota is used up.
        reset_time: Unix seconds when the quota is renewed, if the service told; the live service
            has not been seen to.
    """

    feature: str | None = None
    reset_time: float | None = None


class ServerError(ApiError):
    """5xx, 408 or 423 after every attempt, or a status that no client expects."""


class ResponseDecodeError(AnalyzeError, ValueError):
    """The answer cannot be read: no JSON, cut short, too long, or of another shape.

    Attributes:
        status: HTTP status.
        path: Where in the JSON, such as ``$.data.analysis.data.caption``; ``None`` if no JSON.
        raw_body: The body as received; empty if it was over the limit.
        request_id: For the vendor's support.
        model: The model that was asked; ``None`` outside of analyze calls.
        retry_after: Always ``None``: reading it again would not help.
    """

    status: int = 0
    path: str | None = None
    raw_body: bytes = b""
    request_id: str | None = None
    model: str | None = None
    retry_after: float | None = None


class TaskFailedError(AnalyzeError):
    """The remote work failed.

    Attributes:
        task_id: The task.
        cause_known: Whether the notification that says why arrived. Without it only the status
            is known, and the fields below are ``None``.
        status: The HTTP status that the synchronous call would have had.
        code: See `ApiError`.
        category: See `ApiError`.
        api_message: See `ApiError`.
        details: See `ApiError`.
        request_id: See `ApiError`.
    """

    task_id: str = ""
    cause_known: bool = True
    status: int | None = None
    code: str | None = None
    category: str | None = None
    api_message: str | None = None
    details: Mapping[str, Any] | None = None
    request_id: str | None = None


class TaskTimeoutError(AnalyzeError, TimeoutError):
    """This handle's wait ended. The remote work goes on; `AnalyzeSession.task` waits again.

    Attributes:
        task_id: The task; ``None`` if the service had not accepted it yet.
    """

    task_id: str | None = None


class ResultNotDeliveredError(AnalyzeError):
    """The service completed the task, but its result never arrived here.

    A status poll brings no result; a notification does. The quota was charged.

    Attributes:
        task_id: The task.
        last_status: What the last poll said.
    """

    task_id: str = ""
    last_status: TaskStatus | None = None


class NotificationError(AnalyzeError, ValueError):
    """A webhook that was not accepted. It never touches a task."""


class InvalidSignatureError(NotificationError):
    """The signature is missing, garbled, or of none of the known secrets."""


class StaleNotificationError(NotificationError):
    """The signature is right, but its timestamp is too old or too far in the future."""


class MalformedNotificationError(NotificationError):
    """The body is no JSON object."""


class NotificationSourceError(AnalyzeError):
    """The notification source ended or cannot go on, so pending tasks cannot be resolved.

    Attributes:
        task_id: The task that was pending, if any.
    """

    task_id: str | None = None

    @classmethod
    def for_task(cls, task_id: str | None, message: str) -> Self:
        """Return the error for one pending task."""
        return cls(message, task_id=task_id)


class BulkStoppedError(AnalyzeError):
    """A bulk stream stopped, because an error would have failed every further item alike.

    ``__cause__`` and `reason` are that error. Items not yet sent were not sent.

    Attributes:
        reason: The error that stopped the stream.
    """

    reason: AnalyzeError | None = None


class LedgerError(AnalyzeError):
    """The ledger cannot be read or written, or belongs to something else."""


def shorten(body: bytes, length: int = SHOWN_BODY) -> str:
    """Return the beginning of a raw body as text fit for a message."""
    text = body[: 4 * length].decode("utf-8", "replace")
    text = " ".join(text.split())
    return text if len(text) <= length else f"{text[:length]}…"
