"""JSON for the emulator: orjson where it is installed, the standard library elsewhere."""

from __future__ import annotations

import json
from typing import Any

try:
    import orjson
except ImportError:  # pragma: no cover - depends on what is installed
    orjson = None  # type: ignore[assignment]


def dump_json(value: Any) -> bytes:
    """Return ``value`` as compact UTF-8 JSON."""
    if orjson is not None:
        try:
            return orjson.dumps(value)
        except TypeError:  # an integer over 64 bits, in a result that a test wrote
            pass
    return json.dumps(value, separators=(",", ":")).encode()


def load_json(body: bytes) -> Any:
    """Return the value of a JSON text.

    Raises:
        ValueError: The text is not JSON, or is nested too deeply.
    """
    if orjson is not None:
        return orjson.loads(body)
    try:
        return json.loads(body)
    except RecursionError:
        raise ValueError("The JSON text is nested too deeply.") from None
