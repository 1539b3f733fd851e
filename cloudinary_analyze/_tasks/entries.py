"""The parts of the table of tasks: entries, the waits on them, answers, errors, and effects.

The states of an entry:

| phase        | task id | in      | waits | polls  | `due`           | next                       |
|--------------|---------|---------|-------|--------|-----------------|----------------------------|
| `SUBMITTING` | None    | -       | 0..n  | no     | None            | PENDING, RESTING, OVER     |
| `PENDING`    | set     | pending | 1..n  | yes    | None            | GRACE, RESTING, OVER       |
| `GRACE`      | set     | pending | 1..n  | no     | grace ends then | REPEATING, RESTING, OVER   |
| `REPEATING`  | set     | pending | 0..n  | no     | grace ended     | OVER                       |
| `RESTING`    | set     | resting | 0     | no     | None or grace's | PENDING, GRACE, OVER       |
| `OVER`       | any     | -       | 0     | no     | None            | -                          |

`OVER` means answered, merged into another entry of the same task, or refused. `due` is set by the
first poll that says *completed* or *failed*, and later handles never move it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, final

import attrs

from cloudinary_analyze._wire.protocol import build_task_failure, find_result, reports_progress
from cloudinary_analyze.config import Settings
from cloudinary_analyze.errors import (
    ApiError,
    NotFoundError,
    QuotaExceededError,
    RemoteError,
    ResultNotDeliveredError,
    SessionClosedError,
    TaskFailedError,
    TaskLimitError,
    TaskTimeoutError,
    shorten,
)
from cloudinary_analyze.requests import MODELS, AnalyzeRequest
from cloudinary_analyze.responses import Limit, Notification, Response, TaskStatus, find_limits
from cloudinary_analyze.webhooks import parse_notification

if TYPE_CHECKING:
    from cloudinary_analyze._http.call import Owner
    from cloudinary_analyze._http.quota import Quota
    from cloudinary_analyze.events import TaskAnswered

MISSES: Final = 2
LEFT: Final = -1  # the index of a wait that is no longer in its entry
UNKNOWN: Final = "unknown"


class Phase:
    """See the table in the module's docstring. Strings, because an `Enum` is slow to compare."""

    SUBMITTING: Final = "submitting"
    PENDING: Final = "pending"
    GRACE: Final = "grace"
    REPEATING: Final = "repeating"
    RESTING: Final = "resting"
    OVER: Final = "over"


AWAITED: Final = frozenset({Phase.PENDING, Phase.GRACE})


@attrs.define(eq=False, repr=False, weakref_slot=False)
class Answer:
    """The end of a task or a wait: bytes that are decoded on demand, a response, or an error.

    Attributes:
        by: See `TaskAnswered`.
        error: The error, if there is no result.
        body: The JSON object that holds the result.
        response: The response of a call.
        guess: Whether it was assumed because the notification is missing, and may be corrected.
    """

    by: str
    error: Exception | None = None
    body: bytes | None = None
    response: Response[Any] | None = None
    guess: bool = False

    @property
    def status(self) -> str:
        """The remote state that it implies."""
        if self.error is None:
            return "completed"
        failures = (TaskFailedError, QuotaExceededError)
        return "failed" if isinstance(self.error, failures) else "completed"

    @property
    def lasting(self) -> bool:
        """Whether it is the outcome of the task, also for later handles."""
        if self.error is None:
            return True
        if self.by == "poll" and isinstance(self.error, ApiError):
            # other errors concern the poll itself
            return isinstance(self.error, QuotaExceededError)
        return self.by != "session"


@attrs.define(eq=False, repr=False, weakref_slot=False)
class Wait:
    """The wait of one handle for an entry.

    Attributes:
        entry: The entry that it waits for. It changes if two entries turn out to be one task.
        model: The model's name in URLs.
        analysis_type: How to decode the result.
        answer: The answer that ended the wait.
        due: The monotonic instant when it ends without an answer.
        index: Its place in the entry's list, or `LEFT`.
        future: The handle's, if it is awaited. The table never touches it.
    """

    entry: Entry
    model: str
    analysis_type: type[Any]
    answer: Answer | None = None
    due: float | None = None
    index: int = 0
    future: asyncio.Future[Any] | None = None

    def __lt__(self, _: object) -> bool:
        return False


@attrs.define(eq=False, repr=False, weakref_slot=False)
class Entry:
    """The state of one task.

    Attributes:
        request: The request; ``None`` if the task was attached by its id alone.
        task_id: ``None`` until the service accepted it.
        status: The remote state as last reported.
        phase: See the module's docstring.
        waits: The handles that still wait.
        since: Monotonic instant of its registration. `-inf` before.
        due: When the grace for its notification ends.
        poll_at: When its next poll is due; written by the poller, cleared here.
        interval: Seconds before the last poll; written by the poller.
        misses: Polls after the first minute that did not find the task.
        verified: Whether the service has ever named or found the task.
        unobserved: Whether a handle was dropped that was never awaited.
        owner: Asked before the request is repeated as a call.
    """

    request: AnalyzeRequest[Any] | None
    task_id: str | None = None
    status: str = "submitting"
    phase: str = Phase.SUBMITTING
    waits: list[Wait] = attrs.field(factory=list)
    since: float = -math.inf
    due: float | None = None
    poll_at: float | None = None
    interval: float = 0.0
    misses: int = 0
    verified: bool = False
    unobserved: bool = False
    owner: Owner | None = None

    def __lt__(self, _: object) -> bool:
        return False

    @property
    def model(self) -> str:
        """The model's name in URLs, for messages."""
        if self.request is not None:
            return self.request.model
        return self.waits[0].model if self.waits else "model unknown"

    @property
    def forgotten(self) -> bool:
        """Whether the service repeatedly did not know the task."""
        return self.misses >= MISSES


@final
@attrs.define(eq=False, weakref_slot=False)
class Ended:
    """Waits ended with an answer.

    ``entry`` is set if the whole task is answered. ``raw`` is the parsed body of the answer.
    """

    waits: Sequence[Wait]
    answer: Answer
    entry: Entry | None = None
    raw: Mapping[str, Any] | None = None

    @property
    def model(self) -> str | None:
        """The model's name in URLs, if the request or a handle is known."""
        if self.entry is not None and self.entry.request is not None:
            return self.entry.request.model
        return self.waits[0].model if self.waits else None


@final
@attrs.define(eq=False, weakref_slot=False)
class Changed:
    """The status or the id of a task changed."""

    waits: Sequence[Wait]


@final
@attrs.define(eq=False, weakref_slot=False)
class Poll:
    """Schedule the next poll of an entry."""

    entry: Entry
    at_once: bool = False


@final
@attrs.define(eq=False, weakref_slot=False)
class Repeat:
    """Repeat a task as a call."""

    entry: Entry
    request: AnalyzeRequest[Any]


@final
@attrs.define(eq=False, weakref_slot=False)
class Seen:
    """Count a parked notification that was used, or that found no task."""

    verdict: str
    task_id: str


Effect = Ended | Changed | Poll | Repeat | Seen

NOBODY: Final[list[Wait]] = []  # of every entry that is over; nothing is ever appended


def build_event(ended: Ended, task_id: str, seconds: float) -> TaskAnswered:
    """Return the event of a task's answer, some seconds after the registration of its entry."""
    answer = ended.answer
    limits: tuple[Limit, ...] = ()
    if ended.raw is not None:
        limits = find_limits(ended.raw)
    elif isinstance(answer.error, RemoteError) and answer.by != "analyze":
        limits = answer.error.limits
    from cloudinary_analyze.events import TaskAnswered

    return TaskAnswered(
        task_id=task_id,
        by=answer.by,
        model=ended.model,
        seconds=None if math.isinf(seconds) else seconds,
        limits=limits,
        error=answer.error,
    )


def note_quota(quota: Quota, entry: Entry, ended: Ended) -> None:
    """Record the quotas of a task as the oldest figures, because tasks end in any order."""
    answer, raw = ended.answer, ended.raw
    error = answer.error
    if error is None and raw is not None:
        limits = raw.get("limits")
        if limits is None and isinstance(data := raw.get("data"), dict):
            limits = data.get("limits")
        if limits:
            quota.note(entry.model, limits, number=0)
        if quota.breakers and not answer.guess:
            quota.take_result(_find_feature(entry, ended), since=entry.since)
    elif isinstance(error, RemoteError) and answer.lasting and answer.by != "analyze":
        quota.take_failure(_find_feature(entry, ended), error, number=0, since=entry.since)


def _find_feature(entry: Entry, ended: Ended) -> str:
    """Return the feature that a task is charged to. Empty if neither side names it."""
    request, error = entry.request, ended.answer.error
    if request is not None:
        return request.feature or request.model
    kind = MODELS.get(ended.model or getattr(error, "model", None) or "")
    return (kind.feature if kind is not None else getattr(error, "feature", None)) or ""


def read_answer(
    notification: Notification, body: bytes, task_id: str, entry: Entry | None
) -> Answer | None:
    """Return the answer of a notification, or ``None`` if its task is still running.

    A notification of the end without an analysis is decoded to an error.
    """
    if notification.failed:
        model = "model unknown" if entry is None else entry.model
        error = build_task_failure(task_id, model=model, notification=notification, body=body)
        return Answer("notification", error)
    result = find_result(notification.raw)
    if not result and reports_progress(notification):
        return None
    return Answer("notification", None, body, None, result is None)


def corrects(notification: Notification, parked: bytes) -> bool:
    """Whether a notification reports the end of a task, and the parked one does not."""
    return _is_readable(notification) and not _is_readable(parse_notification(parked))


def _is_readable(notification: Notification) -> bool:
    return notification.failed or find_result(notification.raw) is not None


def build_timeout(entry: Entry, what: str) -> TaskTimeoutError:
    if entry.task_id is None:
        message = what.format("that the service had not accepted yet")
    elif entry.status == UNKNOWN:
        message = (
            f"{what.format(entry.task_id)} The service does not know a task with this id (404). "
            "Check the id and the cloud name."
        )
    else:
        message = (
            f"{what.format(entry.task_id)} The remote work continues; its last known status is "
            f"{entry.status!r}. Call session.task(task_id, …) to wait again."
        )
    ambiguous = entry.phase == Phase.SUBMITTING
    return TaskTimeoutError(message, task_id=entry.task_id, ambiguous=ambiguous)


def build_limit_error(task_id: str, most: int) -> TaskLimitError:
    return TaskLimitError(
        f"The session already waits for {most:,} task ids that the service has not confirmed, so "
        f"it does not wait for {shorten(task_id)}. Nothing was sent, and the task is not affected. "
        "Check ids before you pass them to session.task, or try again once other handles have "
        "ended.",
        task_id=task_id,
    )


def build_not_found(entry: Entry, error: NotFoundError) -> NotFoundError:
    failure = NotFoundError(
        f"The service does not know the task {entry.task_id} (404). Check the id and the "
        "cloud name.",
        status=error.status,
        request_id=error.request_id,
    )
    failure.__cause__ = error
    return failure


def build_missing(
    entry: Entry, task_id: str, settings: Settings, *, with_source: bool
) -> ResultNotDeliveredError:
    if settings.on_missing_result == "analyze":
        how = "Pass the request to repeat it as a call: session.task(task_id, request)."
    elif not with_source:
        how = (
            "Attach a notification source (AnalyzeSession(notifications=…, "
            "notification_url=…)), or submit with mode='call', or set "
            "Settings.on_missing_result='analyze'."
        )
    else:
        how = (
            f"No notification arrived within {settings.result_grace:.0f} s. Check that "
            "the service reaches the notification URL, and that its signature is accepted "
            "(session.stats.notifications)."
        )
    return ResultNotDeliveredError(
        f"The task {task_id} ({entry.model}) is completed, but its result did not arrive. "
        f"Only a notification carries the result, not a status poll. {how} "
        "The quota was charged.",
        task_id=task_id,
        last_status=TaskStatus(task_id, entry.status),
    )


def build_closed(task_id: str | None) -> SessionClosedError:
    if task_id is None:
        return SessionClosedError("The session was closed before the task was submitted.")
    return SessionClosedError(
        f"The session was closed while the task {task_id} was pending. The remote work continues; "
        "call session.task(task_id, …) in another session to wait again.",
        task_id=task_id,
    )
