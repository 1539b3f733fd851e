"""Which failed attempts are repeated, and when. Pure; the only file that knows backoff.

Of backoff only the wait generators are used: its decorators hold policy at import time, sleep by
themselves, and their jitter may wait less than the server asked for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from cloudinary_analyze.config import Settings
from cloudinary_analyze.errors import (
    AnalyzeError,
    ApiError,
    AuthenticationError,
    BadRequestError,
    ConfigurationError,
    LedgerError,
    NotFoundError,
    PermissionDeniedError,
    QuotaExceededError,
    RateLimitedError,
    ServerError,
    SessionStateError,
    TaskFailedError,
    TransportError,
)

FINAL_STATUSES: Final = frozenset({400, 413, 415, 422})
SERVER_JITTER = 0.1  # of the wait that the server asked for, on top of it
LEAST_SERVER_JITTER = 0.25  # seconds


def prepare() -> None:
    """Import backoff ahead of the first failure, when file descriptors may be short."""
    import backoff  # noqa: F401


def build_waits(settings: Settings) -> Iterator[float]:
    """Yield the waits before jitter, in seconds: doubling, up to the cap."""
    import backoff

    waits = backoff.expo(factor=settings.backoff_first, max_value=settings.backoff_max)
    next(waits)  # backoff's generators yield nothing of use first
    while True:
        yield min(float(next(waits)), settings.backoff_max)


def is_retriable(error: AnalyzeError, *, retry_ambiguous: bool) -> bool:
    """Whether another attempt may succeed and may be made."""
    if error.ambiguous and not retry_ambiguous:
        return False
    if isinstance(error, TransportError):
        return not error.permanent
    if isinstance(error, QuotaExceededError):
        return False
    if isinstance(error, ServerError):
        return error.status >= 400  # a redirect stays one
    return isinstance(error, RateLimitedError)


def is_throttle(error: AnalyzeError) -> bool:
    """Whether the service asked everybody to slow down: 429, 420, or 503 with Retry-After."""
    if isinstance(error, RateLimitedError):
        return not isinstance(error, QuotaExceededError)
    return isinstance(error, ServerError) and error.status == 503 and error.retry_after is not None


def compute_wait(own_wait: float, retry_after: float | None, *, chance: float) -> float:
    """Return how long to wait before the next attempt.

    Args:
        own_wait: Our own wait before jitter, capped.
        retry_after: What the server asked for, within the cap; ``None`` if it did not.
        chance: From 0 to 1, evenly.

    Returns:
        Seconds: our own wait jittered down to its half at the least, so that it stays spread
        out at the cap; never less than the server asked for, with jitter on top.
    """
    wait = own_wait * (1 - chance / 2)
    if retry_after is None:
        return wait
    jitter = chance * max(LEAST_SERVER_JITTER, SERVER_JITTER * retry_after)
    return max(retry_after + jitter, wait)


def decide_wait(
    error: AnalyzeError,
    attempt: int,
    settings: Settings,
    *,
    own_wait: float,
    chance: float,
) -> float | None:
    """Return the seconds until the next attempt, or ``None`` if the error is final.

    Args:
        error: Why the attempt failed.
        attempt: Its number, from 1.
        settings: The policy.
        own_wait: From `build_waits`.
        chance: From 0 to 1, evenly.
    """
    if attempt >= settings.attempts or asks_for_more(error, settings.max_server_wait):
        return None
    if not is_retriable(error, retry_ambiguous=settings.retry_ambiguous):
        return None
    retry_after = error.retry_after if isinstance(error, ApiError) else None
    wait = compute_wait(own_wait, retry_after, chance=chance)
    return wait if retry_after is None else min(wait, settings.max_server_wait)


def asks_for_more(error: Exception, seconds: float) -> bool:
    """Whether the service asks for a longer wait than that."""
    return (
        isinstance(error, ApiError)
        and error.retry_after is not None
        and error.retry_after > seconds
    )


def is_final(error: AnalyzeError) -> bool:
    """Whether the same request would fail alike at any later time, so that it is recorded.

    A 404 counts if it answers an analyze call in the service's own words: a proxy may say 404
    for reasons of the moment, and a status poll's tells of a task.
    """
    if isinstance(error, BadRequestError):
        return error.status in FINAL_STATUSES
    if isinstance(error, NotFoundError):
        return error.model is not None and bool(error.api_message or error.code or error.details)
    return isinstance(error, TaskFailedError)


_STOPPING = (
    AuthenticationError,
    PermissionDeniedError,
    QuotaExceededError,
    SessionStateError,
    ConfigurationError,
    LedgerError,
)


def stops_the_stream(error: Exception, settings: Settings) -> bool:
    """Whether an error would fail every further item alike."""
    return isinstance(error, _STOPPING) or asks_for_more(error, settings.max_server_wait)
