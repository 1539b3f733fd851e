"""Values as JSON: `to_dict` and `to_json`, and their JSON Schema for pydantic and FastAPI.

The keys are the names of attributes:

| value | keys |
|---|---|
| `Response` | ``model``, ``entity``, ``request_id``, ``limits``, ``analysis``, ``raw`` |
| an analysis | its attributes; ``detections`` replaces ``tags``, which groups them by label |
| `Detection` | ``label``, ``confidence``, ``bounding_box``, ``categories``, ``attributes``, ``raw`` |
| `Answered` | its attributes; an ``item`` that is not JSON becomes its text |
| `Failed` | as `Answered` |
| a request | ``model``, ``source`` (``{"uri": …}`` or ``{"asset_id": …}``), ``parameters`` |
| an error | ``type``, ``message``, ``ambiguous``, then its own attributes, ``raw_body`` |
| `Limit` | its attributes; ``reset_time`` in ISO 8601 |
| `TaskStatus` | ``task_id``, ``state``, ``finished``, ``request_id``, ``raw`` |
| `SessionStats` | its attributes |

A ``bounding_box`` is ``[x, y, width, height]``.

``raw`` and ``raw_body`` contain what the service sent. They are included only with ``raw=True``,
except the ``raw`` of an unknown model's analysis, which is always included. Unknown values are
``None``. A number that JSON cannot represent (NaN, infinity) becomes ``None``, and an unpaired
surrogate becomes U+FFFD.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from datetime import date, datetime
from enum import Enum
from functools import cache
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Any, Final, TypeVar, Union, get_args, get_origin, get_type_hints

import attrs

from cloudinary_analyze._budget import Budget, Spent
from cloudinary_analyze._meter import SessionStats
from cloudinary_analyze._values import quote
from cloudinary_analyze._wire import codec
from cloudinary_analyze.analyses import (
    AIVisionModerationAnalysis,
    Analysis,
    AttributeValue,
    BoundingBox,
    DetectedTags,
    Detection,
    DetectionAnalysis,
    GoogleLabel,
    Logo,
    LogoVertex,
    ModerationAnswer,
    VisionAnswer,
    VisionTag,
    Watermark,
)
from cloudinary_analyze.errors import AnalyzeError, ConfigurationError
from cloudinary_analyze.outcomes import Answered, Failed
from cloudinary_analyze.requests import AnalyzeRequest, Asset, Uri
from cloudinary_analyze.responses import Limit, Response, TaskStatus

if TYPE_CHECKING:
    import cattrs

try:
    import orjson
except ImportError:  # the [speed] extra
    orjson = None  # type: ignore[assignment, unused-ignore]

__all__ = ["to_dict", "to_json"]

_KINDS: Final = (
    Response,
    Analysis,
    Detection,
    DetectedTags,
    Answered,
    Failed,
    AnalyzeRequest,
    Limit,
    TaskStatus,
    SessionStats,
    Budget,
    Spent,
    AttributeValue,
    GoogleLabel,
    Logo,
    LogoVertex,
    ModerationAnswer,
    VisionAnswer,
    VisionTag,
    Watermark,
    Uri,
    Asset,
)

# the classes whose keys are not their fields
_KEYS: Final[Mapping[type[Any], tuple[str, ...]]] = {
    Response: ("model", "entity", "request_id", "limits", "analysis", "raw"),
    DetectionAnalysis: ("model_version", "detections"),
    AIVisionModerationAnalysis: ("model_version", "rejected", "responses"),
    Detection: ("label", "confidence", "bounding_box", "categories", "attributes", "raw"),
    TaskStatus: ("task_id", "state", "finished", "request_id", "raw"),
    AnalyzeRequest: ("model", "source", "parameters"),
}
_RECEIVED: Final = frozenset({"raw", "raw_body"})


def to_dict(value: Any, *, raw: bool = False) -> dict[str, Any]:
    """Return a value as a dictionary of plain JSON types, equal to the parsed text of `to_json`.

    Args:
        value: A response, analysis, detection, outcome, request, error, limit, task status,
            budget or `SessionStats`.
        raw: Whether to include what the service sent.

    Raises:
        ConfigurationError: The value has another type, or an outcome's item cannot be converted to
            JSON.
    """
    text = to_json(value, raw=raw)
    try:
        result: dict[str, Any] = codec.loads(text.encode())
    except (ValueError, RecursionError):
        raise ConfigurationError(
            f"The {type(value).__name__} is nested too deeply for a dictionary. Use to_json."
        ) from None
    return result


def to_json(value: Any, *, raw: bool = False) -> str:
    """Return a value as compact JSON text. Integers of any size keep their digits.

    ```python
    response = await session.analyze(Captioning(urls[0]))
    print(to_json(response))  # {"model":"captioning","entity":…,"analysis":{"caption":…}}
    print(to_json(response, raw=True))  # also what the service sent
    ```

    Args:
        value: See `to_dict`.
        raw: Whether to include what the service sent. `Response.from_raw` reads the ``raw`` of a
            response back.

    Raises:
        ConfigurationError: See `to_dict`.
    """
    if not isinstance(value, _KINDS) and not isinstance(value, AnalyzeError):
        raise ConfigurationError(
            "to_dict and to_json take a response, an analysis, an outcome, a request, an error "
            f"or another value of this package, not {type(value).__name__}."
        )
    try:
        return _dump(_build_converter(raw=raw).unstructure(value))
    except Exception as error:  # an item of the user may raise anything
        raise ConfigurationError(
            f"The {type(value).__name__} cannot be written as JSON: {quote(error)}."
        ) from error


def _dump(tree: Any) -> str:
    if orjson is not None:
        try:
            return orjson.dumps(tree).decode()
        except TypeError:  # an integer over 64 bits, an unpaired surrogate, or deep nesting
            pass
    try:
        text = _encode(tree)
    except (ValueError, RecursionError):  # NaN, infinity, or almost too deep to be read
        text = codec.dump_deep(tree)
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


def _encode(tree: Any) -> str:
    return json.dumps(tree, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


@cache
def _build_converter(*, raw: bool) -> cattrs.Converter:
    import cattrs

    converter = cattrs.Converter()
    write = converter.unstructure

    def build_object(kind: type[Any]) -> Callable[[Any], dict[str, Any]]:
        keys = list_keys(kind, raw=raw)

        def write_object(value: Any) -> dict[str, Any]:
            # received values are plain JSON already, and may be nested deeply
            return {
                key: _receive(getattr(value, key))
                if key in _RECEIVED
                else write(getattr(value, key))
                for key in keys
            }

        return write_object

    def write_error(error: BaseException) -> dict[str, Any]:
        if not isinstance(error, AnalyzeError):
            return {"type": type(error).__name__, "message": str(error), "ambiguous": False}
        fields = {name: value for name, value in vars(error).items() if not name.startswith("_")}
        written = {
            "type": type(error).__name__,
            "message": fields.pop("message"),
            "ambiguous": fields.pop("ambiguous"),
        }
        for name, value in fields.items():
            if raw or name not in _RECEIVED:
                is_json = name == "details" or name in _RECEIVED
                written[name] = _receive(value) if is_json else write(value)
        return written

    # the last registered hook that fits is used
    hooks: list[tuple[Callable[[Any], bool], Callable[[Any], Any]]] = [
        (lambda _: True, str),
        (lambda kind: issubclass(kind, str | int | float | NoneType), lambda value: value),
        (lambda kind: issubclass(kind, date), lambda value: value.isoformat()),
        (lambda kind: issubclass(kind, Enum), lambda value: write(value.value)),
        (
            lambda kind: issubclass(kind, list | tuple | set | frozenset),
            lambda values: [write(value) for value in values],
        ),
        (
            lambda kind: issubclass(kind, Mapping),
            lambda values: {str(key): write(value) for key, value in values.items()},
        ),
        (lambda kind: issubclass(kind, BaseException), write_error),
    ]
    for fits, hook in hooks:
        converter.register_unstructure_hook_func(fits, hook)
    converter.register_unstructure_hook_factory(
        lambda kind: issubclass(kind, _KINDS) and kind is not DetectedTags, build_object
    )
    converter.register_unstructure_hook(bytes, lambda value: value.decode("utf-8", "replace"))
    converter.register_unstructure_hook(Uri, lambda source: {"uri": source.uri})
    converter.register_unstructure_hook(Asset, lambda source: {"asset_id": source.asset_id})
    return converter


def _receive(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return dict(value) if isinstance(value, Mapping) else value


def list_keys(kind: type[Any], *, raw: bool) -> tuple[str, ...]:
    """Return the keys of a kind of value, in their order."""
    for base in kind.__mro__:
        if base in _KEYS:
            keys = _KEYS[base]
            break
    else:
        keys = tuple(field.name for field in attrs.fields(kind))
        raw = True  # the analysis of an unknown model
    return tuple(key for key in keys if raw or key not in _RECEIVED)


@attrs.frozen
class PydanticHooks:
    """An annotation for pydantic: it accepts an instance and serializes it with `to_dict`.

    Attributes:
        source: Its class, or one with its parameters, such as ``Response[CaptioningAnalysis]``.
    """

    source: Any

    def __get_pydantic_core_schema__(self, _source: Any, _handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.is_instance_schema(
            get_origin(self.source) or self.source,
            serialization=core_schema.plain_serializer_function_ser_schema(to_dict),
        )

    def __get_pydantic_json_schema__(self, _schema: Any, handler: Any) -> dict[str, Any]:
        from pydantic_core import core_schema

        # a schema with a reference becomes a component of an OpenAPI document
        named = core_schema.any_schema(ref=f"cloudinary_analyze.{_name(self.source)}")
        reference: dict[str, Any] = handler(core_schema.definitions_schema(named, []))
        handler.resolve_ref_schema(reference).update(_describe(self.source))
        return reference


_SCALARS: Final[Mapping[Any, dict[str, Any]]] = {
    Any: {},
    NoneType: {"type": "null"},
    str: {"type": "string"},
    bool: {"type": "boolean"},
    int: {"type": "integer"},
    float: {"type": "number"},
    datetime: {"type": "string", "format": "date-time"},
    BoundingBox: {
        "type": "array",
        "description": "x, y, width, height",
        "items": {"type": "number"},
        "minItems": 4,
        "maxItems": 4,
    },
    Exception: {
        "type": "object",
        "title": "Error",
        "properties": {
            "type": {"type": "string"},
            "message": {"type": "string"},
            "ambiguous": {"type": "boolean"},
        },
        "required": ["type", "message", "ambiguous"],
    },
    AnalyzeRequest: {
        "type": "object",
        "title": "Request",
        "properties": {
            "model": {"type": "string"},
            "source": {"type": "object"},
            "parameters": {"type": "object"},
        },
        "required": ["model", "source", "parameters"],
    },
}


def _describe(hint: Any) -> dict[str, Any]:
    """Return the JSON Schema of the result of `to_dict` for a type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if hint in _SCALARS or origin in _SCALARS:
        return dict(_SCALARS[hint if hint in _SCALARS else origin])
    if origin in {Union, UnionType}:
        return {"anyOf": [_describe(argument) for argument in arguments]}
    kind = origin or hint
    if isinstance(kind, type) and issubclass(kind, _KINDS):
        return _describe_object(kind, arguments)
    if origin is tuple:
        return {"type": "array", "items": _describe(arguments[0])}
    if isinstance(kind, type) and issubclass(kind, Mapping):
        values = _describe(arguments[1]) if arguments else {}
        return {"type": "object", "additionalProperties": values}
    return {}


def _describe_object(kind: type[Any], arguments: tuple[Any, ...]) -> dict[str, Any]:
    named = dict(zip(getattr(kind, "__parameters__", ()), arguments, strict=False))
    keys = list_keys(kind, raw=False)
    hints = get_type_hints(kind)
    properties = {}
    for key in keys:
        found = getattr(kind, key, None)
        hint = get_type_hints(found.fget)["return"] if isinstance(found, property) else hints[key]
        properties[key] = _describe(_fill(hint, named))
    return {
        "type": "object",
        "title": _name(kind, arguments),
        "properties": properties,
        "required": list(keys),
    }


def _name(kind: Any, arguments: tuple[Any, ...] = ()) -> str:
    kind, arguments = get_origin(kind) or kind, arguments or get_args(kind)
    names = ", ".join(getattr(argument, "__name__", str(argument)) for argument in arguments)
    return f"{kind.__name__}[{names}]" if names else str(kind.__name__)


def _fill(hint: Any, named: Mapping[Any, Any]) -> Any:
    """Replace the type variables of a hint."""
    if isinstance(hint, TypeVar):
        return named.get(hint, Any)
    if parameters := getattr(hint, "__parameters__", ()):
        return hint[tuple(named.get(parameter, Any) for parameter in parameters)]
    return hint
