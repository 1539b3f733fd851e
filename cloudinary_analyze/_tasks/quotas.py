"""Record the quotas that the end of a task reports."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloudinary_analyze._tasks.entries import Ended, Entry
from cloudinary_analyze.errors import RemoteError
from cloudinary_analyze.requests import MODELS

if TYPE_CHECKING:
    from cloudinary_analyze._http.quota import Quota


def note_quota(quota: Quota, entry: Entry, ended: Ended, *, newest: int) -> None:
    """Record the quotas of a task as the oldest figures, because tasks end in any order.

    Args:
        quota: The quotas of the session.
        entry: The task.
        ended: How it ended.
        newest: The number of the attempt that began last.
    """
    answer, raw = ended.answer, ended.raw
    error = answer.error
    if error is None and raw is not None:
        limits = raw.get("limits")
        if limits is None and isinstance(data := raw.get("data"), dict):
            limits = data.get("limits")
        if limits:
            quota.note(entry.model, limits, number=0, newest=newest)
        if quota.breakers and not answer.guess:
            quota.take_result(_find_feature(entry, ended), since=entry.since)
    elif isinstance(error, RemoteError) and answer.lasting and answer.by != "analyze":
        feature = _find_feature(entry, ended)
        quota.take_failure(feature, error, number=0, newest=newest, since=entry.since)


def _find_feature(entry: Entry, ended: Ended) -> str:
    """Return the feature that a task is charged to. Empty if neither side names it."""
    request, error = entry.request, ended.answer.error
    if request is not None:
        return request.feature or request.model
    model = ended.waits[0].model if ended.waits else getattr(error, "model", None)
    kind = MODELS.get(model or "")
    return (kind.feature if kind is not None else getattr(error, "feature", None)) or ""
