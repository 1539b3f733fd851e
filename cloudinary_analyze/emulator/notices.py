"""Tasks, and the bodies of their notifications, genuine and faulty."""

from __future__ import annotations

from secrets import token_hex
from typing import Any, Final

import attrs

from cloudinary_analyze.emulator._json import dump_json
from cloudinary_analyze.emulator.analyses import build_analysis
from cloudinary_analyze.emulator.canned import CannedResult, find_analysis, find_refusal
from cloudinary_analyze.emulator.quotas import Charge, QuotaBook
from cloudinary_analyze.emulator.validation import AnalyzeRequest, Refusal

UNKNOWN_STATUS: Final = "queued_for_gpu"


@attrs.define(eq=False)
class EmulatedTask:
    """One accepted task. Its result is built when it is needed, so a task stays small.

    Attributes:
        task_id: The id that was returned to the client.
        request: The request.
        request_id: The id of the request that was accepted.
        charge: Its cost. ``None`` if it ends with an error that the fault plan did not cause.
        accepted_at: When it was accepted, on the loop's clock.
        seconds: How long it works.
        faults: The names of the faults of this task.
        canned: The result that was written in advance, if any.
        outcome: ``"completed"`` or ``"failed"`` once it is over.
        notified: Whether a genuine notification was answered 200.
    """

    task_id: str
    request: AnalyzeRequest
    request_id: str
    charge: Charge | None
    accepted_at: float
    seconds: float
    faults: tuple[str, ...] = ()
    canned: CannedResult | None = None
    outcome: str | None = None
    notified: bool = False

    @property
    def model(self) -> str:
        """The model's name."""
        return self.request.model.name

    @property
    def source(self) -> str:
        """The URI or the asset id."""
        return self.request.source

    def read_status(self, now: float) -> str:
        """Return the task's status at an instant (``now``) of the loop's clock."""
        if self.outcome is not None:
            return self.outcome
        if "unknown_status" in self.faults:
            return UNKNOWN_STATUS
        return "pending" if now < self.accepted_at + self.seconds / 3 else "processing"


def build_result(task: EmulatedTask) -> dict[str, Any]:
    """Return ``data`` of a completed task."""
    return {"entity": task.source, "analysis": find_analysis(task.request, task.canned)}


def compose_notification(task: EmulatedTask, kind: str, quota_book: QuotaBook) -> bytes:
    """Return the body of a notification about a task.

    Args:
        task: A task that is over.
        kind: ``"genuine"``, ``"duplicate"``, or one of the plan's extra kinds.
        quota_book: Builds ``limits``.
    """
    match kind:
        case "malformed":
            return b'{"operation_name": "analyze", "task_id": '
        case "unrelated":
            content = {
                "notification_type": "upload",
                "asset_id": token_hex(16),
                "public_id": "emulator/upload",
                "resource_type": "image",
                "request_id": token_hex(16),
            }
        case "foreign":
            content = _compose_wrong(task, token_hex(80), kind)
        case "forged" | "stale":
            content = _compose_wrong(task, task.task_id, kind)
        case _:
            content = _compose_genuine(task, quota_book)
    return dump_json(content)


def _compose_genuine(task: EmulatedTask, quota_book: QuotaBook) -> dict[str, Any]:
    content = _compose_head(task.task_id, task.request_id)
    if task.outcome == "failed":
        refusal = find_refusal(task.request, task.canned) or Refusal(
            500, "internal server error", category="server_error"
        )
        content["http_status"] = refusal.status
        content["error"] = refusal.build_error(task.request_id)
    else:
        content["http_status"] = 200
        content["data"] = build_result(task)
    if task.charge is not None:
        content["limits"] = quota_book.build_limits(task.charge)
    return content


def _compose_wrong(task: EmulatedTask, task_id: str, kind: str) -> dict[str, Any]:
    """Return a success for another source, to detect a client that accepts it."""
    source = f"https://{kind}.invalid/{task_id[:16]}.jpg"
    content = _compose_head(task_id, token_hex(16))
    content["http_status"] = 200
    analysis = build_analysis(attrs.evolve(task.request, source=source))
    content["data"] = {"entity": source, "analysis": analysis}
    return content


def _compose_head(task_id: str, request_id: str) -> dict[str, Any]:
    return {
        "operation_name": "analyze",
        "operation_type": "single",
        "notification_type": "analyze",
        "request_id": request_id,
        "task_id": task_id,
    }
