"""JSON text to values and back, and the typed analysis of an answer. Picks the JSON library.

The shapes themselves, and cattrs, are in `structure`, which is imported with the first session.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any, Final

try:
    import orjson
except ImportError:  # the [speed] extra
    orjson = None  # type: ignore[assignment, unused-ignore]


def loads(text: bytes) -> Any:
    """Return the value of JSON.

    Raises:
        ValueError: It is none.
        RecursionError: It is nested too deeply.
    """
    if orjson is not None:
        try:
            return orjson.loads(text)
        except ValueError:
            pass  # it is stricter (NaN, half a surrogate pair); what is paid for must be read
    return json.loads(text)


def dumps(value: Any) -> bytes:
    """Return compact JSON."""
    if orjson is not None:
        try:
            return orjson.dumps(value)
        except TypeError:  # an integer over 64 bits, which JSON allows
            pass
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")  # half a surrogate pair may have come from the service


class CodecError(ValueError):
    """A value is of another shape than the model's.

    Attributes:
        path: Where, relative to the value: ``.data.caption``.
    """

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message)
        self.path = path


_readers: Final[dict[type[Any], Callable[[Any, Any], Any]]] = {}


def prepare() -> None:
    """Import what `read_analysis` needs, ahead of the first call."""
    from cloudinary_analyze._wire import structure

    structure.build_converter(detailed=False)


def read_analysis(raw: Mapping[str, Any], kind: type[Any]) -> Any:
    """Return the typed analysis of a ``data.analysis`` object.

    Structuring runs without cattrs' detailed validation; only when it fails it runs again with
    it, for the path in the error.

    Raises:
        CodecError: A field that the model cannot be without is missing or of another type.
    """
    read = _readers.get(kind)
    if read is None:
        read = _readers[kind] = _build_reader(kind)
    try:
        return read(raw, kind)
    except Exception:
        return _read_detailed(raw, kind)


def _build_reader(kind: type[Any]) -> Callable[[Any, Any], Any]:
    from cloudinary_analyze._wire import structure

    return structure.build_converter(detailed=False).get_structure_hook(kind)


def _read_detailed(raw: Mapping[str, Any], kind: type[Any]) -> Any:
    from cloudinary_analyze._wire import structure

    try:
        return structure.build_converter(detailed=True).structure(raw, kind)
    except Exception as error:
        path, reason = structure.locate(error)
        raise CodecError(reason, path) from error
