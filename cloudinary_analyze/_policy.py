"""The policy for errors: retry, slow down, stop or record. Only this module uses backoff.

`find_rule` has the table for HTTP statuses, for responses of calls and for failures of tasks. Only
backoff's wait generators are used. Its decorators fix the policy at import time, sleep without our
clock, and their jitter may wait less than the server asked for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from itertools import islice
from typing import Final

import attrs

from cloudinary_analyze.config import Settings
from cloudinary_analyze.errors import (
    AnalyzeError,
    ApiError,
    AuthenticationError,
    BadRequestError,
    BudgetReachedError,
    ConfigurationError,
    LedgerError,
    NotFoundError,
    OutageError,
    PacerError,
    PermissionDeniedError,
    QuotaExceededError,
    RateLimitedError,
    RemoteError,
    ServerError,
    SessionStateError,
    TaskFailedError,
    TransportError,
)
from cloudinary_analyze.responses import Limit

QUOTA_CODES: Final = frozenset({"MA_00008"})  # documented for an exhausted quota
SERVER_JITTER = 0.1  # share of the wait that the server asked for, added to it
LEAST_SERVER_JITTER = 0.25  # seconds


class Stop(Enum):
    """The requests that an error makes pointless."""

    EVERYTHING = "everything"
    FEATURE = "feature"  # the models that share the add-on's quota
    MODEL = "model"


@attrs.frozen(kw_only=True, repr=False, eq=False)
class Rule:
    """The meaning of an HTTP status, of a response to a call or of a failed task.

    Attributes:
        error: The class of a call's error. A task's is `TaskFailedError`, unless its quota is
            used up.
        retriable: Whether another attempt may succeed soon.
        ambiguous: Whether the service may have analyzed the image, and charged for it, despite the
            error.
        throttle: Whether the whole session slows down.
        permanent: Whether the same request will always fail, so that a ledger records the error.
        stop: Which other requests would fail with the same error.
    """

    error: type[ApiError]
    retriable: bool = False
    ambiguous: bool = False
    throttle: bool = False
    permanent: bool = False
    stop: Stop | None = None


_REFUSED: Final = Rule(error=BadRequestError)
_INVALID: Final = Rule(error=BadRequestError, permanent=True)
_LIMITED: Final = Rule(error=RateLimitedError, retriable=True, throttle=True)
_BROKEN: Final = Rule(error=ServerError, retriable=True)
_UNCERTAIN: Final = Rule(error=ServerError, retriable=True, ambiguous=True)
_UNEXPECTED: Final = Rule(error=ServerError)  # redirects are not followed
_UNKNOWN_SUCCESS: Final = Rule(error=ServerError, ambiguous=True)  # 2xx but 200 and 202

QUOTA: Final = Rule(error=QuotaExceededError, stop=Stop.FEATURE)
RULES: Final[Mapping[int, Rule]] = {
    400: _INVALID,
    401: Rule(error=AuthenticationError, stop=Stop.EVERYTHING),
    403: Rule(error=PermissionDeniedError, stop=Stop.MODEL),
    404: Rule(error=NotFoundError, permanent=True),  # see `is_final`
    408: _BROKEN,
    413: _INVALID,
    415: _INVALID,
    420: _LIMITED,
    422: _INVALID,
    423: _BROKEN,
    429: _LIMITED,
    500: _UNCERTAIN,
    502: _UNCERTAIN,
    503: _BROKEN,  # with Retry-After it also throttles; see `is_throttle`
    504: _UNCERTAIN,
}
# a notification may report a failure without its status
_CATEGORIES: Final[Mapping[str | None, int]] = {
    "user_error": 400,
    "auth_error": 403,
    "rate_limit_error": 429,
    "server_error": 503,
}


def find_rule(status: int) -> Rule:
    """Return the rule for a status."""
    rule = RULES.get(status)
    if rule is not None:
        return rule
    if status >= 500:
        return _BROKEN
    if status >= 400:
        return _REFUSED
    return _UNKNOWN_SUCCESS if 200 <= status < 300 else _UNEXPECTED


def _judge(error: RemoteError) -> Rule:
    """Return the rule for an error that the service reported, for a call or for a task.

    A task that failed without a known cause counts as permanent, because the service reports
    nothing else.
    """
    if isinstance(error, QuotaExceededError):
        return QUOTA
    if isinstance(error, TaskFailedError):
        status = error.status if error.status >= 400 else _CATEGORIES.get(error.category, 400)
        return find_rule(status)
    if error.status:
        return find_rule(error.status)
    return next((rule for rule in RULES.values() if rule.error is type(error)), _UNEXPECTED)


def is_exhausted(
    status: int,
    category: str | None,
    code: str | None,
    limits: Iterable[Limit],
    feature: str | None,
) -> bool:
    """Whether the quota of the add-on is used up, as opposed to a rate limit.

    Args:
        status: HTTP status of the call or of the failed task; 0 if unknown.
        category: The error's category, used if the status is unknown.
        code: The error's code.
        limits: The limits in the response.
        feature: The model's add-on feature. ``None`` if unknown.
    """
    if (status if status >= 400 else _CATEGORIES.get(category)) != 429:
        return False
    left = [limit.remaining for limit in limits if feature in {None, limit.type}]
    used_up = [remaining is not None and remaining <= 0 for remaining in left]
    # if the feature is unknown, any of the limits may be the one that was reached
    return code in QUOTA_CODES or (any(used_up) if feature else bool(used_up) and all(used_up))


def prepare() -> None:
    """Import backoff before the first failure, when file descriptors may have run out."""
    import backoff  # noqa: F401


def build_waits(settings: Settings) -> Iterator[float]:
    """Yield the waits in seconds, before jitter. They double up to the cap."""
    import backoff

    waits = backoff.expo(factor=settings.backoff_first, max_value=settings.backoff_max)
    next(waits)  # the first value of backoff's generators is `None`
    while True:
        yield min(float(next(waits)), settings.backoff_max)


def compute_patience(settings: Settings) -> float:
    """Return the maximum seconds of all our own waits of a call."""
    return sum(islice(build_waits(settings), settings.attempts - 1))


def is_retriable(error: AnalyzeError, *, retry_ambiguous: bool) -> bool:
    """Whether another attempt of a call may succeed and is allowed."""
    if error.ambiguous and not retry_ambiguous:
        return False
    if isinstance(error, TransportError):
        return not error.permanent
    return isinstance(error, ApiError) and _judge(error).retriable


def is_throttle(error: AnalyzeError) -> bool:
    """Whether the service asked its clients to slow down: 429, 420, or 503 with Retry-After."""
    if not isinstance(error, ApiError):
        return False
    asked = error.status == 503 and error.retry_after is not None
    return asked or _judge(error).throttle


def is_outage(error: AnalyzeError) -> bool:
    """Whether the service or the network failed, independent of the request."""
    if isinstance(error, TransportError):
        return True
    return isinstance(error, ApiError) and _judge(error).retriable


def compute_wait(own_wait: float, retry_after: float | None, *, chance: float) -> float:
    """Return how long to wait before the next attempt.

    Args:
        own_wait: Our own wait before jitter, capped.
        retry_after: The wait that the server asked for, within the cap. ``None`` if it asked for
            none.
        chance: From 0 to 1, evenly.

    Returns:
        Seconds. Jitter reduces our own wait to no less than half of it, so that waits at the cap
        stay spread out. A wait that the server asked for is never shortened; jitter is added to it.
    """
    wait = own_wait * (1 - chance / 2)
    if retry_after is None:
        return wait
    jitter = chance * max(LEAST_SERVER_JITTER, SERVER_JITTER * retry_after)
    return max(retry_after + jitter, wait)


def decide_wait(
    error: AnalyzeError, settings: Settings, *, own_wait: float, chance: float
) -> float | None:
    """Return the seconds until the next attempt, or ``None`` if the error is final.

    Args:
        error: Why the attempt failed.
        settings: The policy.
        own_wait: From `build_waits`.
        chance: From 0 to 1, evenly.
    """
    if asks_for_more(error, settings.max_server_wait):
        return None
    if not is_retriable(error, retry_ambiguous=settings.retry_ambiguous):
        return None
    retry_after = error.retry_after if isinstance(error, ApiError) else None
    wait = compute_wait(own_wait, retry_after, chance=chance)
    return wait if retry_after is None else min(wait, settings.max_server_wait)


def asks_for_more(error: Exception, seconds: float) -> bool:
    """Whether the service asks for a longer wait than the maximum."""
    return (
        isinstance(error, ApiError)
        and error.retry_after is not None
        and error.retry_after > seconds
    )


def is_final(error: AnalyzeError) -> bool:
    """Whether the same request will always fail, so that a ledger records the error.

    A 404 counts only if it is the response to an analyze call and has the service's error format. A
    proxy may return 404 for a moment, and the 404 of a status poll concerns a task.
    """
    if isinstance(error, NotFoundError):
        return error.model is not None and bool(error.api_message or error.code or error.details)
    return isinstance(error, RemoteError) and _judge(error).permanent


_STOPPING: Final = (ConfigurationError, LedgerError, OutageError, PacerError, SessionStateError)


def may_be_charged(error: Exception) -> bool:
    """Whether a request that ended with an error was charged, as far as is known.

    An accepted task counts as charged, whatever its outcome, unless its quota was used up.
    """
    if not isinstance(error, AnalyzeError) or error.ambiguous:
        return isinstance(error, AnalyzeError)
    if isinstance(error, ApiError):
        return False
    # a ledger fails after the response
    accepted = isinstance(error, TaskFailedError | LedgerError)
    return accepted or bool(getattr(error, "task_id", None))


def find_stop(error: Exception, settings: Settings) -> Stop | None:
    """Return which other requests would fail with the same error. ``None``: this item only."""
    if isinstance(error, BudgetReachedError):
        return Stop.EVERYTHING if error.feature is None else Stop.FEATURE
    if isinstance(error, _STOPPING) or asks_for_more(error, settings.max_server_wait):
        return Stop.EVERYTHING
    if isinstance(error, TransportError) and error.permanent:
        return Stop.EVERYTHING  # all requests go to one host
    if not isinstance(error, RemoteError):
        return None
    stop = _judge(error).stop
    if stop is None and isinstance(error, ApiError) and not error.attempts:
        return Stop.EVERYTHING  # not sent, because of a wait that the service asked for
    return stop
