"""Errors as JSON and back: how a ledger stores them.

Pure. No pickle, so that reading a ledger runs nothing.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

import attrs

from cloudinary_analyze import errors
from cloudinary_analyze._wire import codec
from cloudinary_analyze.errors import AnalyzeError
from cloudinary_analyze.responses import Limit, TaskStatus


def dump_error(error: AnalyzeError) -> bytes:
    """Return the type, message and fields of an error as JSON."""
    fields = {
        name: _dump_field(value)
        for name, value in vars(error).items()
        if name != "message" and not name.startswith("__") and value is not None
    }
    return codec.dumps({"type": type(error).__name__, "message": error.message, "fields": fields})


def load_error(content: bytes) -> AnalyzeError:
    """Return the error that `dump_error` received, with the same class and fields.

    An error of an unknown class becomes an `AnalyzeError`.

    Raises:
        ValueError: The content is not such JSON.
    """
    try:
        stored = codec.loads(content)
        kind = getattr(errors, stored["type"], AnalyzeError)
        if not (isinstance(kind, type) and issubclass(kind, AnalyzeError)):
            kind = AnalyzeError
        error = kind(stored["message"])
        known = vars(error)  # another version may have stored other fields
        known.update({k: _load_field(v) for k, v in stored["fields"].items() if k in known})
        for name, value in known.items():
            if not isinstance(value, _TYPES.get(name, object)):
                raise TypeError(f"{name} is {type(value).__name__}")
        return error
    except (AttributeError, LookupError, RecursionError, TypeError) as error:
        raise ValueError(f"an error in an unexpected shape: {error!r}") from error


_TEXT: Final = str | None
_NUMBER: Final = int | float | None
_TYPES: Final[Mapping[str, Any]] = {
    "message": str,
    "ambiguous": bool,
    "status": int | None,
    "details": Mapping | None,
    "limits": tuple,
    "raw_body": bytes,
    "last_status": TaskStatus | None,
    **dict.fromkeys(("retry_after", "reset_time", "seconds", "attempts"), _NUMBER),
    **dict.fromkeys(
        ("code", "category", "api_message", "request_id", "model", "feature", "task_id", "path"),
        _TEXT,
    ),
}


# a field that is not JSON is stored in a list with its kind
def _dump_field(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, bytes):
        return ["bytes", base64.b64encode(value).decode()]
    if isinstance(value, tuple) and all(isinstance(entry, Limit) for entry in value):
        return ["limits", [_dump_limit(limit) for limit in value]]
    if isinstance(value, TaskStatus):
        return ["status", {**attrs.asdict(value, recurse=False), "raw": dict(value.raw)}]
    if isinstance(value, Mapping):
        return ["json", dict(value)]
    return repr(value)


def _load_field(value: Any) -> Any:
    if not isinstance(value, list):
        return value
    kind, content = value
    match kind:
        case "bytes":
            return base64.b64decode(content)
        case "limits":
            return tuple(_load_limit(limit) for limit in content)
        case "status":
            return TaskStatus(content.pop("task_id"), content.pop("state"), **content)
        case _:
            return content


def _dump_limit(limit: Limit) -> dict[str, Any]:
    reset_time = limit.reset_time and limit.reset_time.isoformat()
    return {**attrs.asdict(limit), "reset_time": reset_time}


def _load_limit(stored: dict[str, Any]) -> Limit:
    reset_time = stored["reset_time"] and datetime.fromisoformat(stored["reset_time"])
    return Limit(stored.pop("type"), **{**stored, "reset_time": reset_time})


def make_encodable(source: str) -> str:
    """Return a text without the halves of surrogate pairs, which UTF-8 cannot encode."""
    return source.encode(errors="replace").decode()
