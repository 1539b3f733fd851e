"""The record of an outcome: one line of ``results.jsonl``. The one place that decides its format.

Pure. A record holds what was asked, what was answered and what went wrong, and no secret; source
URLs stand in it in full, query strings included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cloudinary_analyze._wire import codec
from cloudinary_analyze.bulk.input import InputItem
from cloudinary_analyze.errors import AnalyzeError
from cloudinary_analyze.outcomes import AnyOutcome
from cloudinary_analyze.responses import Limit


def build_record(outcome: AnyOutcome) -> dict[str, Any]:
    """Return the record of an outcome, ready for JSON.

    Every record has every field; what is not known is ``None``.

    ====================  =====================================================================
    ``index``             Place among the items of the run, from 0.
    ``line``              Line of the input file, from 1.
    ``source``            The URL or ``asset:ID``; of a bad line, the beginning of its text.
    ``model``             The model's wire name; ``None`` for a bad line.
    ``key``               The request's key, see `AnalyzeRequest.key`.
    ``status``            ``"ok"`` or ``"error"``.
    ``analysis``          ``data.analysis`` as received.
    ``entity``            What the service says it analysed.
    ``request_id``        The service's id of the request; of a failed one too.
    ``limits``            What the answer said of quotas, a list.
    ``seconds``           From the item's pull to its answer.
    ``error``             ``type``, ``message``, ``status``, ``code``, ``details``,
                          ``request_id``, ``ambiguous`` (it may have been charged).
    ====================  =====================================================================
    """
    item, request, response = outcome.item, outcome.request, outcome.response
    line = item.line if isinstance(item, InputItem) else None
    source: str | None = None
    if request is not None:
        source = str(request.source)
    elif line is not None:
        source = line.text
    error = None if outcome.error is None else _build_error(outcome.error)
    record: dict[str, Any] = {
        "index": outcome.index,
        "line": None if line is None else line.number,
        "source": source,
        "model": None if request is None else request.model,
        "key": None if request is None else request.key,
        "status": "error" if response is None else "ok",
        "analysis": None,
        "entity": None,
        "request_id": None if error is None else error["request_id"],
        "limits": [],
        "seconds": round(outcome.seconds, 4),
        "error": error,
    }
    limits: tuple[Limit, ...] = getattr(outcome.error, "limits", ())
    if response is not None:
        record["analysis"] = response.raw.get("data", {}).get("analysis")
        record["entity"] = response.entity
        record["request_id"] = response.request_id
        limits = response.limits
    record["limits"] = [_build_limit(limit) for limit in limits]
    return record


def dump_record(record: Mapping[str, Any]) -> bytes:
    """Return a record as a line of JSON, with its line feed."""
    return codec.dumps(record) + b"\n"


def _build_limit(limit: Limit) -> dict[str, Any]:
    return {
        "type": limit.type,
        "used_by_request": limit.used_by_request,
        "remaining": limit.remaining,
        "limit": limit.limit,
        "reset_time": None if limit.reset_time is None else limit.reset_time.isoformat(),
    }


def _build_error(error: Exception) -> dict[str, Any]:
    ours = error if isinstance(error, AnalyzeError) else None
    details = getattr(ours, "details", None)
    return {
        "type": type(error).__name__,
        "message": str(error) or repr(error) if ours is None else ours.message,
        "status": getattr(ours, "status", None) or None,  # 0: there was none
        "code": getattr(ours, "code", None),
        "details": None if details is None else dict(details),
        "request_id": getattr(ours, "request_id", None),
        "ambiguous": ours is not None and ours.ambiguous,
    }
