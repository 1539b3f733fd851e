"""The record of an outcome: one line of ``results.jsonl``. Only this module decides its format.

Pure. A record contains the request, the response and the error, and no secrets. It contains source
URLs in full, query strings included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from cloudinary_analyze._wire import codec
from cloudinary_analyze._wire.protocol import find_result
from cloudinary_analyze.errors import AnalyzeError, InvalidRequestError
from cloudinary_analyze.ledger.items import LedgerItem
from cloudinary_analyze.outcomes import AnyOutcome
from cloudinary_analyze.requests import Asset, Uri
from cloudinary_analyze.responses import JSONObject, Limit, find_limits, find_string


@attrs.frozen
class InputLine:
    """One line or record of the input: a source, or the error of an invalid line.

    Attributes:
        number: The line in the file where it begins, from 1.
        text: The text of the source. For an invalid line, its beginning.
        source: What to analyze. ``None`` if the line is invalid.
        error: Why the line is invalid.
        name: The text that identifies the item instead of its source, if the input has one.
        file: The file, if there are several.
        columns: The columns of its row that are kept for the output.
    """

    number: int
    text: str
    source: Uri | Asset | None = None
    error: InvalidRequestError | None = None
    name: str | None = None
    file: str | None = None
    columns: JSONObject | None = None


@attrs.frozen
class InputItem:
    """An item of a run: a line, and the model that analyzes it.

    Attributes:
        line: The line.
        model: The model's name. ``None`` for an invalid line.
        index: Its position among the items of the run, from 0, if that is counted.
        key: The key of its request, if nothing can be recorded for it yet.
    """

    line: InputLine
    model: str | None = None
    index: int | None = None
    key: str | None = None


def build_record(outcome: AnyOutcome) -> dict[str, Any]:
    """Return the record of an outcome, as a mapping for JSON.

    Every record has every field. Unknown values are ``None``.

    ====================  =====================================================================
    ``index``             Position among the items of the run, from 0.
    ``file``              The input file, where there are several.
    ``line``              Line of the input file, from 1.
    ``source``            The URL or ``asset:ID``; of an invalid line, the beginning of its text.
    ``model``             The model's name; ``None`` for an invalid line.
    ``item_key``          What identifies the item instead of its source (``--key-column``).
    ``key``               The item's key in a ledger, see `AnalyzeRequest.key`.
    ``status``            ``"ok"`` or ``"error"``.
    ``analysis``          ``data.analysis`` as received.
    ``entity``            The service's name of what it analyzed.
    ``request_id``        The service's id of the request, also of a failed one.
    ``limits``            The quotas in the response, a list; ``used_by_request`` is its cost.
    ``restored``          Whether it was not charged for; see `Answered.restored`.
    ``seconds``           How long its attempts took, retries included; 0 if nothing was sent.
    ``error``             ``type``, ``message``, ``status``, ``code``, ``details``,
                          ``request_id``, ``ambiguous`` (it may have been charged).
    ``input``             The columns of its row in the input.
    ====================  =====================================================================
    """
    item, request, response = outcome.item, outcome.request, outcome.response
    if isinstance(item, InputItem):
        line, index = item.line, outcome.index if item.index is None else item.index
    else:
        line, index = None, outcome.index
    source: str | None = None
    if request is not None:
        source = str(request.source)
    elif line is not None:
        source = line.text
    return _build(
        index=index,
        line=line,
        source=source,
        model=None if request is None else request.model,
        key=None if request is None else request.key,
        raw=None if response is None else response.raw,
        error=outcome.error,
        seconds=outcome.seconds,
        restored=outcome.restored,
    )


def build_line_record(item: InputItem) -> dict[str, Any]:
    """Return the record of an invalid line, for which no request is sent."""
    return _build(
        index=item.index,
        line=item.line,
        source=item.line.text,
        model=None,
        key=None,
        raw=None,
        error=item.line.error,
        seconds=None,
        restored=False,
    )


def build_ledger_record(item: LedgerItem) -> dict[str, Any]:
    """Return the record of a finished item of a ledger, as `build_record` does for an outcome."""
    return _build(
        index=item.index,
        line=item,
        source=item.source,
        model=item.model,
        key=item.key,
        raw=item.response,
        error=item.error,
        seconds=item.seconds,
        restored=item.restored,
    )


def _build(
    *,
    index: int | None,
    line: InputLine | LedgerItem | None,
    source: str | None,
    model: str | None,
    key: str | None,
    raw: JSONObject | None,
    error: Exception | None,
    seconds: float | None,
    restored: bool,
) -> dict[str, Any]:
    described = None if error is None else _build_error(error)
    limits: tuple[Limit, ...] = getattr(error, "limits", ())
    request_id = None if described is None else described["request_id"]
    if raw is not None:
        limits, request_id = find_limits(raw), find_string(raw, "request_id")
    number = line.number if isinstance(line, InputLine) else None if line is None else line.line
    return {
        "index": index,
        "file": None if line is None else line.file,
        "line": number,
        "source": source,
        "model": model,
        "item_key": None if line is None else line.name,
        "key": key,
        "status": "error" if raw is None else "ok",
        "analysis": None if raw is None else find_result(raw),
        "entity": None if raw is None else find_string(raw, "entity"),
        "request_id": request_id,
        "limits": [_build_limit(limit) for limit in limits],
        "restored": restored,
        "seconds": None if seconds is None else round(seconds, 4),
        "error": described,
        "input": None if line is None or line.columns is None else dict(line.columns),
    }


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
