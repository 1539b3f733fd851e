"""Which failed attempts are repeated, and when. Pure; the only file that knows backoff.

Of backoff only the wait generators are used: its decorators hold policy at import time, sleep by
themselves, and their jitter may wait less than the server asked for.
"""

from __future__ import annotations

from collections.abc import Iterator

import backoff

from cloudinary_analyze.config import Settings
from cloudinary_analyze.errors import (
    AnalyzeError,
    ApiError,
    QuotaExceededError,
    RateLimitedError,
    ServerError,
    TransportError,
    asks_for_more,
)

SERVER_JITTER = 0.1  # of the wait that the server asked for, on top of it
LEAST_SERVER_JITTER = 0.25  # seconds


def build_waits(settings: Settings) -> Iterator[float]:
    """Yield the waits before jitter, in seconds: doubling, up to the cap."""
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
