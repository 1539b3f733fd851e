"""JSON text to values and back, and the typed analysis of a response. Chooses the JSON library.

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


# orjson turns integers over 64 bits into floats; the shortest has 19 digits
_SAME_DIGIT: Final = bytes.maketrans(b"123456789", b"0" * 9)
_LONG_NUMBER: Final = b"0" * 19

DEEPEST: Final = 1024  # levels of nesting, as orjson reads them


def loads(text: bytes) -> Any:
    """Return the value of JSON. Integers of any size stay integers.

    Raises:
        ValueError: It is not valid JSON.
        RecursionError: It is nested too deeply.
    """
    # `rfind` takes half the time of `find` for a pattern of equal bytes
    if orjson is not None and text.translate(_SAME_DIGIT).rfind(_LONG_NUMBER) < 0:
        try:
            return orjson.loads(text)
        except ValueError:
            pass  # orjson is stricter (NaN, an unpaired surrogate), but paid responses must be read
    try:
        value = json.loads(text, parse_int=_parse_integer)
    except RecursionError:
        if orjson is None:
            raise
        return orjson.loads(text)  # orjson reads deeper nesting, up to Python 3.11
    if is_deep(value, DEEPEST):  # newer Pythons read what others could not read back
        raise ValueError(f"nested in more than {DEEPEST} levels")
    return value


def _parse_integer(digits: str) -> int | str:
    try:
        return int(digits)
    except ValueError:  # over sys.get_int_max_str_digits(): kept as text
        return digits


def dumps(value: Any) -> bytes:
    """Return compact JSON without loss, for any strings, integers and nesting.

    Numbers that JSON does not have (NaN, infinity) are written as null.
    """
    if orjson is not None:
        try:
            return orjson.dumps(value)
        except TypeError:  # an integer over 64 bits, an unpaired surrogate, or 255 levels
            pass
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except (RecursionError, ValueError):  # nested too deeply, or NaN or infinity
        text = dump_deep(value)
    return text.encode("utf-8", "backslashreplace")  # writes half a surrogate pair as JSON does


def dump_deep(value: Any) -> str:
    """Return JSON without recursion, for what is nested almost too deeply; see `dumps`."""
    parts: list[str] = []
    stack: list[tuple[Any, bool]] = [(value, False)]  # and whether it is JSON already
    while stack:
        item, is_json = stack.pop()
        if is_json:
            parts.append(item)
        elif isinstance(item, dict):
            stack.append(("}", True))
            for index, (key, inner) in reversed(list(enumerate(item.items()))):
                name = json.dumps(str(key), ensure_ascii=False)
                stack += [(inner, False), (f"{',' if index else ''}{name}:", True)]
            parts.append("{")
        elif isinstance(item, (list, tuple)):
            stack.append(("]", True))
            for index, inner in reversed(list(enumerate(item))):
                stack += [(inner, False), ("," if index else "", True)]
            parts.append("[")
        elif isinstance(item, float) and not abs(item) < float("inf"):
            parts.append("null")
        else:
            parts.append(json.dumps(item, ensure_ascii=False))
    return "".join(parts)


def is_deep(value: Any, levels: int) -> bool:
    """Whether a value is nested in more than a number of levels of objects and arrays."""
    level = [value]
    for _ in range(levels + 1):
        inner: list[Any] = []
        for entry in level:
            if isinstance(entry, dict):
                inner += entry.values()
            elif isinstance(entry, list):
                inner += entry
        if not inner:
            return False
        level = inner
    return True


class CodecError(ValueError):
    """A value has another shape than the model's.

    Attributes:
        path: The position, relative to the value: ``.data.caption``.
    """

    def __init__(self, message: str, path: str) -> None:
        super().__init__(message)
        self.path = path


_readers: Final[dict[type[Any], Callable[[Any, Any], Any]]] = {}


def prepare() -> None:
    """Import the modules of `read_analysis` before the first call."""
    from cloudinary_analyze._wire import structure

    structure.build_converter()


def read_analysis(raw: Mapping[str, Any], kind: type[Any]) -> Any:
    """Return the typed analysis of a ``data.analysis`` object.

    Raises:
        CodecError: A required field of the model is missing or has another type.
    """
    read = _readers.get(kind)
    if read is None:
        read = _readers[kind] = _build_reader(kind)
    try:
        return read(raw, kind)
    except Exception as error:
        from cloudinary_analyze._wire import structure

        path, reason = structure.locate(error)
        raise CodecError(reason, path) from error


def _build_reader(kind: type[Any]) -> Callable[[Any, Any], Any]:
    from cloudinary_analyze._wire import structure

    return structure.build_converter().get_structure_hook(kind)
