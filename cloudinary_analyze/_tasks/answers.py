"""Build the answers and errors that end a task or a wait. Pure."""

from __future__ import annotations

from cloudinary_analyze._tasks.entries import UNKNOWN, Answer, Entry, Phase
from cloudinary_analyze._wire.protocol import build_task_failure, find_result, reports_progress
from cloudinary_analyze.config import Settings
from cloudinary_analyze.errors import (
    NotFoundError,
    ResultNotDeliveredError,
    SessionClosedError,
    TaskLimitError,
    TaskTimeoutError,
    shorten,
)
from cloudinary_analyze.responses import Notification, TaskStatus
from cloudinary_analyze.webhooks import parse_notification


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
