"""The error tree. Every error that this package raises on purpose is an `AnalyzeError`.

There are three families. No usable response arrived: `TransportError`, `ResponseDecodeError`. The
service reported an error: `RemoteError`, which is `ApiError` for a call and `TaskFailedError` for a
task. The wait on this side ended: `CallTimeoutError`, `TaskTimeoutError`,
`ResultNotDeliveredError`. Errors also subclass the matching built-in, can be pickled, and never
contain secrets. Text from outside is shortened and escaped before it enters a message.

.. include:: docs/errors.md
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import copy
from typing import Any, Final, TypedDict, TypeVar

import attrs

from cloudinary_analyze.responses import Limit, TaskStatus

__all__ = [
    "AnalyzeError",
    "ApiError",
    "AttemptTimeoutError",
    "AuthenticationError",
    "BadRequestError",
    "BudgetReachedError",
    "BulkStoppedError",
    "CallTimeoutError",
    "ConfigurationError",
    "ForeignCancellationError",
    "InvalidRequestError",
    "InvalidSignatureError",
    "LedgerError",
    "MalformedNotificationError",
    "NotFoundError",
    "NotificationError",
    "NotificationSourceError",
    "OutageError",
    "PacerError",
    "PermissionDeniedError",
    "QuotaExceededError",
    "RateLimitedError",
    "RemoteError",
    "RemoteFields",
    "ResponseDecodeError",
    "ResultNotDeliveredError",
    "ServerError",
    "SessionAlreadyOpenError",
    "SessionClosedError",
    "SessionNotOpenError",
    "SessionStateError",
    "StaleNotificationError",
    "TaskFailedError",
    "TaskLimitError",
    "TaskTimeoutError",
    "TransportError",
    "WrongEventLoopError",
]

SHOWN_BODY: Final = 200  # characters of external text that a message shows
LONGEST_MESSAGE: Final = 2000  # characters
LONGEST_LOGGED: Final = 4000  # characters of an error that a log line is built from
# a query string, or what precedes the host
_CREDENTIALS: Final = re.compile(r"\?[^\s'\"<>)]+|(?<=//)[^\s/@]*@")


# `auto_exc` would make every field a part of `args`. Subclasses without fields need no decorator.
@attrs.define(kw_only=True, slots=False, eq=False, repr=False, auto_exc=False)
class AnalyzeError(Exception):
    """The base class of all errors of this package.

    Attributes:
        message: What happened, what it means, and what to do.
        ambiguous: Whether the service may have accepted (and charged) the request although its
            response is not available. Repeating the request may cost quota again.
    """

    message: str = attrs.field(kw_only=False)
    ambiguous: bool = False

    def __attrs_post_init__(self) -> None:
        if len(self.message) > LONGEST_MESSAGE or not self.message.isprintable():
            # ids, paths and hosts from outside must not forge log lines or control a terminal
            self.message = shorten(self.message, LONGEST_MESSAGE - 1)  # and an ellipsis
        self.args: tuple[Any, ...] = (self.message,)

    def __str__(self) -> str:
        if self.ambiguous:
            return f"{self.message} The request may have been accepted, and charged."
        return self.message

    def __reduce__(self) -> tuple[Any, ...]:
        # the default protocol cannot rebuild a constructor with keyword-only arguments
        return _rebuild_error, (type(self), self.args), self.__dict__


def _rebuild_error(kind: type[AnalyzeError], args: tuple[Any, ...]) -> AnalyzeError:
    error = kind.__new__(kind, *args)
    error.args = args
    return error


class ConfigurationError(AnalyzeError, ValueError):
    """A credential, a setting, an argument or the environment is invalid. Nothing was sent."""


class InvalidRequestError(AnalyzeError, ValueError):
    """A request is invalid. Nothing was sent."""


class ForeignCancellationError(AnalyzeError):
    """Code that was passed in raised `asyncio.CancelledError`, but this work was not cancelled.

    For example, an input or a pacer awaited a future that was cancelled. ``__cause__`` is the
    original error.
    """


class SessionStateError(AnalyzeError, RuntimeError):
    """The session cannot be used in its state or from this event loop. See the subclasses."""


class SessionNotOpenError(SessionStateError):
    """The session was used before ``async with`` opened it."""


class SessionAlreadyOpenError(SessionStateError):
    """The session is already open."""


class WrongEventLoopError(SessionStateError):
    """The session, or a handle of it, was used outside the event loop that opened the session."""


@attrs.define(kw_only=True, slots=False, eq=False, repr=False, auto_exc=False)
class SessionClosedError(SessionStateError):
    """The session was closed, either before this call or while this task was pending.

    Attributes:
        task_id: The task that was pending. `AnalyzeSession.task` re-attaches to it. ``None`` if the
            service had not accepted one yet.
    """

    task_id: str | None = None


@attrs.define(kw_only=True, slots=False, eq=False, repr=False, auto_exc=False)
class TransportError(AnalyzeError, ConnectionError):
    """No response arrived, after every attempt that the settings allow.

    Attributes:
        attempts: How many attempts were made.
        permanent: Whether another attempt cannot succeed (for example, a certificate is refused).
    """

    attempts: int = 1
    permanent: bool = False


class AttemptTimeoutError(TransportError, TimeoutError):
    """The last attempt's connect or read timeout expired (real seconds)."""


@attrs.define(kw_only=True, slots=False, eq=False, repr=False, auto_exc=False)
class CallTimeoutError(AnalyzeError, TimeoutError):
    """The time for the whole call (``timeout=``) expired. ``__cause__`` is the last failure.

    Attributes:
        attempts: How many attempts were made. 0 if the call was still queueing for a permit.
    """

    attempts: int = 0


@attrs.define(kw_only=True, slots=False, eq=False, repr=False, auto_exc=False)
class OutageError(AnalyzeError):
    """The service failed or refused everything for too long, so this request was not sent again.

    Stops a bulk stream. Run it again later with the same ledger, and only the missing items are
    sent. Bulk work waits for `Settings.outage_timeout`, a single call no longer than its own
    retries would have taken. ``__cause__`` is the failure of its last attempt, if it made one.

    Attributes:
        seconds: How long the outage had lasted.
        attempts: How many attempts this call had made. 0 if nothing was sent.
    """

    seconds: float = 0.0
    attempts: int = 0


class PacerError(AnalyzeError):
    """`Settings.pacer` raised, so an attempt was not sent. Stops a bulk stream.

    ``__cause__`` is what it raised.
    """


class RemoteFields(TypedDict, total=False):
    """The keyword arguments of every `RemoteError`, for subclasses; see there."""

    status: int
    code: str | None
    category: str | None
    api_message: str | None
    details: Mapping[str, Any] | None
    request_id: str | None
    retry_after: float | None
    limits: tuple[Limit, ...]
    raw_body: bytes
    model: str | None
    attempts: int
    ambiguous: bool


@attrs.define(kw_only=True, slots=False, eq=False, repr=False, auto_exc=False)
class RemoteError(AnalyzeError):
    """The service reported an error: for a call (`ApiError`) or for a task (`TaskFailedError`).

    Attributes:
        status: The HTTP status of the response, or the one that the task's notification reports. 0
            if unknown.
        code: The service's code, such as ``MA_00003``.
        category: ``user_error``, ``auth_error``, ``server_error``, ``rate_limit_error``, or
            any other category as received.
        api_message: The service's own message.
        details: An object without a fixed shape. Often it contains the only useful text.
        request_id: For the vendor's support.
        retry_after: Seconds that the service asked to wait.
        limits: The quotas in the response.
        raw_body: The whole body as received.
        model: The model of the request. ``None`` if unknown.
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


class ApiError(RemoteError):
    """The response to a call was an error."""


class BadRequestError(ApiError, ValueError):
    """400, 413, 415, 422 and most other 4xx: the same request never succeeds."""


class AuthenticationError(ApiError, PermissionError):
    """401: the credentials do not belong to this cloud."""


@attrs.define(kw_only=True, slots=False, eq=False, repr=False, auto_exc=False)
class PermissionDeniedError(ApiError, PermissionError):
    """403: usually an add-on without subscription.

    Attributes:
        feature: The add-on feature that is not subscribed, if the service named it.
    """

    feature: str | None = None


class NotFoundError(ApiError, LookupError):
    """404: the task, asset, cloud or model is unknown."""


class RateLimitedError(ApiError):
    """429 or 420: too many requests. Retried after pauses of the session before it is raised."""


@attrs.define(kw_only=True, slots=False, eq=False, repr=False, auto_exc=False)
class QuotaExceededError(RateLimitedError):
    """The quota is used up: 429 for a call or a task. Not retried. Nothing was analyzed.

    Raised if the limits show nothing left for the model's feature, or for the documented code
    ``MA_00008``.

    Attributes:
        feature: The feature whose quota is used up.
        reset_time: When the quota resets, in Unix seconds. ``None`` if not sent; the live service
            has not been seen to send it.
        task_id: The task that failed for it; ``None`` for a call.
    """

    feature: str | None = None
    reset_time: float | None = None
    task_id: str | None = None


class ServerError(ApiError):
    """5xx, 408 or 423 after every attempt, or an unexpected status."""


E = TypeVar("E", bound=RemoteError)


def build_unsent(error: E, message: str) -> E:
    """Return the error for a call that was not sent, because of the error of another call."""
    unsent = copy(error)
    unsent.message, unsent.args = message, (message,)
    unsent.attempts, unsent.ambiguous = 0, False  # the original values belong to the other call
    return unsent


@attrs.define(kw_only=True, slots=False, eq=False, repr=False, auto_exc=False)
class ResponseDecodeError(AnalyzeError, ValueError):
    """The response cannot be read: it is not JSON, truncated, too long, or has another shape.

    ``ambiguous`` is true where the unreadable response says that the request was accepted.

    Attributes:
        status: HTTP status.
        path: The position in the JSON, such as ``$.data.analysis.data.caption``. ``None`` if it is
            not JSON.
        raw_body: The body as received; its beginning if it exceeded the limit.
        request_id: For the vendor's support.
        model: The model of the request. ``None`` outside of analyze calls.
    """

    status: int = 0
    path: str | None = None
    raw_body: bytes = b""
    request_id: str | None = None
    model: str | None = None


@attrs.define(kw_only=True, slots=False, eq=False, repr=False, auto_exc=False)
class TaskFailedError(RemoteError):
    """The remote work failed.

    An exhausted quota raises `QuotaExceededError` instead, as it does for a call.

    Attributes:
        task_id: The task.
        cause_known: Whether the notification with the reason arrived. Without it only the
            failure is known, and the fields of `RemoteError` are empty.
    """

    task_id: str = ""
    cause_known: bool = True


@attrs.define(kw_only=True, slots=False, eq=False, repr=False, auto_exc=False)
class TaskTimeoutError(AnalyzeError, TimeoutError):
    """This handle's wait ended. The remote work continues. `AnalyzeSession.task` re-attaches to it.

    Attributes:
        task_id: The task. ``None`` if the service had not accepted it yet.
    """

    task_id: str | None = None


@attrs.define(kw_only=True, slots=False, eq=False, repr=False, auto_exc=False)
class TaskLimitError(AnalyzeError):
    """The session already waits for 10,000 task ids that the service has not confirmed.

    Only handles from `AnalyzeSession.task` are limited, so that requests for made-up ids cannot
    exhaust memory and polls. Nothing was sent, and the task is not affected.

    Attributes:
        task_id: The task that the handle does not wait for.
    """

    task_id: str = ""


@attrs.define(kw_only=True, slots=False, eq=False, repr=False, auto_exc=False)
class ResultNotDeliveredError(AnalyzeError):
    """The service completed the task, but its result never arrived here.

    Only a notification carries the result; a status poll does not. The quota was charged.

    Attributes:
        task_id: The task.
        last_status: The status of the last poll.
    """

    task_id: str = ""
    last_status: TaskStatus | None = None


class NotificationError(AnalyzeError, ValueError):
    """A webhook that was not accepted. It never changes a task."""


class InvalidSignatureError(NotificationError):
    """The signature is missing, malformed, or made with none of the configured secrets."""


class StaleNotificationError(NotificationError):
    """The signature is valid, but its timestamp is too old or too far in the future."""


class MalformedNotificationError(NotificationError):
    """The body is not a JSON object."""


@attrs.define(kw_only=True, slots=False, eq=False, repr=False, auto_exc=False)
class NotificationSourceError(AnalyzeError):
    """The notification source ended or cannot continue, so pending tasks cannot be resolved.

    Attributes:
        task_id: The task that was pending, if any.
    """

    task_id: str | None = None


@attrs.define(kw_only=True, slots=False, eq=False, repr=False, auto_exc=False)
class BulkStoppedError(AnalyzeError):
    """A bulk stream stopped, because every remaining item would fail. No further items were sent.

    Attributes:
        reason: The error that stopped the stream; also ``__cause__``. A pickled copy carries an
            `AnalyzeError` with its text if the original cannot be pickled.
    """

    reason: Exception | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments, state = super().__reduce__()
        return rebuild, arguments, {**state, "reason": _make_portable(self.reason)}


@attrs.define(kw_only=True, slots=False, eq=False, repr=False, auto_exc=False)
class BudgetReachedError(BulkStoppedError):
    """A limit of the stream's `Budget` was reached. Nothing was sent for this item.

    Attributes:
        feature: The feature whose units are spent. ``None``: the calls are spent.
        calls: Calls that the stream spent.
        units: Add-on features and the units that the stream spent.
        overshoot: Add-on features and the units above the limit.
    """

    feature: str | None = None
    calls: int = 0
    units: dict[str, int] = attrs.field(factory=dict)
    overshoot: dict[str, int] = attrs.field(factory=dict)


def _make_portable(error: Exception | None) -> Exception | None:
    """Return the error, or an `AnalyzeError` with its text if it cannot be pickled."""
    if error is None or isinstance(error, AnalyzeError):
        return error
    import pickle

    try:
        pickle.dumps(copy(error))  # a copy is rebuilt as unpickling does
    except Exception:
        return AnalyzeError(f"{type(error).__name__}: {shorten(str(error))}")
    return error


class LedgerError(AnalyzeError):
    """The ledger cannot be read or written, or belongs to another host or cloud name."""


def shorten(text: bytes | str, length: int = SHOWN_BODY) -> str:
    """Return the beginning of external text, safe for a message, a log line or a terminal.

    White space becomes single spaces. Everything else that is not printable is escaped: control
    characters, escape sequences, bidirectional overrides, and what UTF-8 cannot encode.
    """
    if isinstance(text, bytes):
        text = text[: 4 * length].decode("utf-8", "replace")
    text = " ".join(text[: 4 * length].split())
    if not text.isprintable():
        escaped = [
            char if char.isprintable() else char.encode("unicode_escape").decode()
            for char in text[: length + 1]
        ]
        text = "".join(escaped)
    return text if len(text) <= length else f"{text[:length]}…"


def describe_reason(error: BaseException) -> str:
    """Return the text of an error that is not ours, to be followed by a full stop."""
    return shorten(str(error).encode(errors="replace")).rstrip(".") or type(error).__name__


def describe(error: BaseException) -> str:
    """Return a short text about an error of any kind, for a log line.

    Query strings and passwords of URLs in it are left out.
    """
    try:
        text = shorten(_CREDENTIALS.sub("", str(error)[:LONGEST_LOGGED]))
    except Exception:  # the class has a broken `__str__`
        text = ""
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
