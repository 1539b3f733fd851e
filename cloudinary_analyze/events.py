"""What happens inside a session, told to one hook: progress, statistics and telemetry hang on it.

A hook is any callable that takes one event. It runs on the event loop, so it must be quick; what
it raises is logged and never disturbs a call. No event holds a secret or a source URL.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import TypeAlias

import attrs

from cloudinary_analyze._values import Jsonable

logger: logging.Logger = logging.getLogger("cloudinary_analyze")


@attrs.frozen(kw_only=True)
class CallFinished:
    """An analyze call has its answer, or has none after all attempts.

    Attributes:
        model: The model's wire name.
        seconds: From the call to its answer, queueing and retries included (monotonic).
        attempts: HTTP attempts made.
        error: ``None`` on success.
    """

    model: str
    seconds: float
    attempts: int
    error: BaseException | None = None


@attrs.frozen(kw_only=True)
class AttemptRetried:
    """An attempt failed and will be repeated.

    Attributes:
        model: The model's wire name; ``None`` for a status poll.
        attempt: Number of the attempt that failed, from 1.
        wait: Seconds until the next one.
        ambiguous: Whether the failed attempt may have been charged.
        error: Why it failed.
    """

    model: str | None
    attempt: int
    wait: float
    ambiguous: bool
    error: BaseException


@attrs.frozen(kw_only=True)
class SessionPaused:
    """The service asked to slow down; no new attempt starts for a while.

    Attributes:
        seconds: How long from now.
        permits: How many permits are allowed afterwards.
        polls: Whether it is the status polls that pause, not the analyses.
    """

    seconds: float
    permits: int
    polls: bool = False


@attrs.frozen(kw_only=True)
class TaskAccepted:
    """The service accepted a task (202).

    Attributes:
        task_id: The task.
        model: The model's wire name.
    """

    task_id: str
    model: str


@attrs.frozen(kw_only=True)
class TaskAnswered:
    """A task has its answer.

    A task that was answered for want of a notification is told of again when that comes.

    Attributes:
        task_id: The task.
        by: ``"notification"``, ``"poll"``, ``"analyze"`` (repeated as a call), or ``"session"``.
        error: ``None`` on success.
    """

    task_id: str
    by: str
    error: BaseException | None = None


@attrs.frozen(kw_only=True)
class NotificationSeen:
    """A delivery was looked at.

    Attributes:
        verdict: ``"resolved"``, ``"parked"``, ``"duplicate"``, ``"foreign"``, ``"forged"``,
            ``"stale"``, ``"malformed"`` or ``"unrelated"``.
        task_id: The task it names, if it was verified.
    """

    verdict: str
    task_id: str | None = None


Event: TypeAlias = (
    CallFinished | AttemptRetried | SessionPaused | TaskAccepted | TaskAnswered | NotificationSeen
)
EventHook: TypeAlias = Callable[[Event], None]


def _copy_counts(counts: Mapping[str, int]) -> Mapping[str, int]:
    return dict(counts)


@attrs.frozen(kw_only=True)
class SessionStats(Jsonable):
    """A snapshot of a session's counts since it was opened.

    Attributes:
        calls: Analyze calls begun.
        attempts: HTTP attempts of analyze calls.
        retries: Attempts that were repeated.
        ambiguous_retries: Repeated attempts that may have been charged already.
        pauses: Pauses of the session that the service asked for.
        in_flight: Analyze calls begun and not finished.
        permits_in_use: Attempts on the wire now.
        permits_allowed: Attempts allowed at once now; below the setting after a throttle.
        waiting: Attempts queueing for a permit now.
        polls: Status polls made.
        pending: Tasks accepted and not answered.
        parked: Notifications that arrived before their task was known here.
        notifications: Deliveries looked at, by verdict.
    """

    calls: int = 0
    attempts: int = 0
    retries: int = 0
    ambiguous_retries: int = 0
    pauses: int = 0
    in_flight: int = 0
    permits_in_use: int = 0
    permits_allowed: int = 0
    waiting: int = 0
    polls: int = 0
    pending: int = 0
    parked: int = 0
    # a dict of its own: what a session counts with goes on changing
    notifications: Mapping[str, int] = attrs.field(factory=dict, converter=_copy_counts, hash=False)


@attrs.define(eq=False, repr=False)
class Meter:
    """The counts behind `AnalyzeSession.stats`, and the one place that calls ``on_event``.

    Callers test `hook` before they build an event: without one the happy path builds none.
    """

    hook: EventHook | None = None
    calls: int = 0
    attempts: int = 0
    retries: int = 0
    ambiguous_retries: int = 0
    pauses: int = 0
    in_flight: int = 0
    polls: int = 0
    notifications: dict[str, int] = attrs.field(factory=dict)

    def count(self, verdict: str, task_id: str | None = None) -> None:
        """Count a delivery by its verdict."""
        self.notifications[verdict] = self.notifications.get(verdict, 0) + 1
        if self.hook is not None:
            self.tell(NotificationSeen(verdict=verdict, task_id=task_id))

    def tell(self, event: Event) -> None:
        """Tell the hook of an event; what the hook raises is logged and goes no further."""
        if self.hook is None:
            return
        try:
            self.hook(event)
        except (Exception, asyncio.CancelledError):  # no cancellation of ours: hooks cannot await
            logger.exception("The on_event hook failed on %s.", type(event).__name__)
