"""The record of an outcome: one line of ``results.jsonl``. Only this module decides its format.

Pure. A record holds the request, the response and the error, and no secret. It contains source URLs
in full, query strings included.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import attrs

from cloudinary_analyze._wire import codec
from cloudinary_analyze._wire.protocol import find_result
from cloudinary_analyze.errors import AnalyzeError, InvalidRequestError
from cloudinary_analyze.ledger.sqlite import LedgerItem
from cloudinary_analyze.outcomes import AnyOutcome
from cloudinary_analyze.requests import Asset, Uri
from cloudinary_analyze.responses import JSONObject, Limit, find_limits, find_string


@attrs.frozen
class InputLine:
    """One line or record of the input: a source, or the reason why it is none.

    Attributes:
        number: The line in the file where it begins, from 1.
        text: What stands there for the source; the beginning of it, if it is bad.
        source: What to analyse; ``None`` if the line is bad.
        error: Why the line is bad.
        name: What the item is known by instead of its source, where the input names it.
    """

    number: int
    text: str
    source: Uri | Asset | None = None
    error: InvalidRequestError | None = None
    name: str | None = None


@attrs.frozen
class InputItem:
    """An item of a run: a line, and the model that analyses it.

    Attributes:
        line: The line.
        model: The model's wire name; ``None`` for a bad line, which no model sees.
        index: Its place among the items of the run, from 0, where that is counted.
    """

    line: InputLine
    model: str | None = None
    index: int | None = None


def build_record(outcome: AnyOutcome) -> dict[str, Any]:
    """Return the record of an outcome, ready for JSON.

    Every record has every field. Unknown values are ``None``.

    ====================  =====================================================================
    ``index``             Place among the items of the run, from 0.
    ``line``              Line of the input file, from 1.
    ``source``            The URL or ``asset:ID``; of a bad line, the beginning of its text.
    ``model``             The model's wire name; ``None`` for a bad line.
    ``key``               The item's key in a ledger, see `AnalyzeRequest.key`.
    ``status``            ``"ok"`` or ``"error"``.
    ``analysis``          ``data.analysis`` as received.
    ``entity``            The service's name of what it analysed.
    ``request_id``        The service's id of the request, also of a failed one.
    ``limits``            The quotas in the response, a list.
    ``seconds``           How long its attempts took, retries included; 0 if nothing was sent.
    ``error``             ``type``, ``message``, ``status``, ``code``, ``details``,
                          ``request_id``, ``ambiguous`` (it may have been charged).
    ====================  =====================================================================
    """
    item, request, response = outcome.item, outcome.request, outcome.response
    line, index = None, outcome.index
    if isinstance(item, InputItem):
        line, index = item.line, outcome.index if item.index is None else item.index
    source: str | None = None
    if request is not None:
        source = str(request.source)
    elif line is not None:
        source = line.text
    return _build(
        index=index,
        line=None if line is None else line.number,
        source=source,
        model=None if request is None else request.model,
        key=None if request is None else request.key,
        raw=None if response is None else response.raw,
        error=outcome.error,
        seconds=outcome.seconds,
    )


def build_ledger_record(item: LedgerItem) -> dict[str, Any]:
    """Return the record of a ledger's item that is done: as `build_record`, from what is kept."""
    return _build(
        index=item.index,
        line=item.line,
        source=item.source,
        model=item.model,
        key=item.key,
        raw=item.response,
        error=item.error,
        seconds=item.seconds,
    )


def _build(
    *,
    index: int,
    line: int | None,
    source: str | None,
    model: str | None,
    key: str | None,
    raw: JSONObject | None,
    error: Exception | None,
    seconds: float | None,
) -> dict[str, Any]:
    told = None if error is None else _build_error(error)
    limits: tuple[Limit, ...] = getattr(error, "limits", ())
    request_id = None if told is None else told["request_id"]
    if raw is not None:
        limits, request_id = find_limits(raw), find_string(raw, "request_id")
    return {
        "index": index,
        "line": line,
        "source": source,
        "model": model,
        "key": key,
        "status": "error" if raw is None else "ok",
        "analysis": None if raw is None else find_result(raw),
        "entity": None if raw is None else find_string(raw, "entity"),
        "request_id": request_id,
        "limits": [_build_limit(limit) for limit in limits],
        "seconds": None if seconds is None else round(seconds, 4),
        "error": told,
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
