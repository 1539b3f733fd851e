"""The shapes of the analyses: how JSON becomes typed values. Only this module uses cattrs.

Rules of the converter:

* JSON names are mapped here; the analyses have Python names only;
* strings and numbers are never coerced into each other;
* a field with a default may be missing, null or of another type: it keeps its default, because the
  response is paid for. An array is never dropped: its entries must have the right type;
* unknown fields and enum values are accepted;
* detections stay raw until they are accessed (`DetectedTags`).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, Final, Union, get_args, get_origin

import attrs
import cattrs
from cattrs.gen import make_dict_structure_fn, override

from cloudinary_analyze.analyses import (
    Analysis,
    CaptioningAnalysis,
    DetectedTags,
    DetectionAnalysis,
    GoogleLogoDetectionAnalysis,
    GoogleTaggingAnalysis,
    Logo,
    LogoVertex,
    ModelVersion,
    OtherAnalysis,
)


def _read_string(value: Any, _: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a string, not {_name(value)}")
    return value


def _read_float(value: Any, _: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"a number, not {_name(value)}")
    return value


def _read_integer(value: Any, _: Any) -> int:
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"an integer, not {_name(value)}")
    return value


def _name(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _read_scalar(value: Any, _: Any) -> ModelVersion:
    return value if isinstance(value, (int, str, float)) else None


# The two kinds of most responses are read by hand, in half the time.
def _read_detections(value: Mapping[str, Any], kind: type[DetectionAnalysis]) -> Any:
    tags = value.get("tags")
    version = _read_scalar(value.get("model_version"), None)
    return kind(DetectedTags(tags if type(tags) is dict else {}), model_version=version)


def _build_caption(converter: cattrs.Converter) -> Callable[[Any, Any], Any]:
    read = _flatten(converter, CaptioningAnalysis, "data", "caption")

    def read_caption(value: Mapping[str, Any], kind: Any) -> Any:
        inner = value.get("data")
        if type(inner) is not dict or type(caption := inner.get("caption")) is not str:
            return read(value, kind)
        version = _read_scalar(value.get("model_version"), None)
        return CaptioningAnalysis(caption, model_version=version)

    return read_caption


def _is_optional(hint: Any) -> bool:
    return get_origin(hint) in {Union, types.UnionType} and type(None) in get_args(hint)


def _build_optional(converter: cattrs.Converter, hint: Any) -> Callable[[Any, Any], Any]:
    (inner,) = [argument for argument in get_args(hint) if argument is not type(None)]
    read = converter.get_structure_hook(inner)

    def read_optional(value: Any, _: Any) -> Any:
        try:
            return None if value is None else read(value, inner)
        except TypeError:
            return None

    return read_optional


def _is_tuple(hint: Any) -> bool:
    return get_origin(hint) is tuple and get_args(hint)[1:] == (...,)


def _build_tuple(converter: cattrs.Converter, hint: Any) -> Callable[[Any, Any], Any]:
    inner = get_args(hint)[0]
    read = converter.get_structure_hook(inner)

    def read_tuple(value: Any, _: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise TypeError(f"an array, not {_name(value)}")
        entries: list[Any] = []
        try:
            for entry in value:
                entries.append(read(entry, inner))  # noqa: PERF401 -- counted for the error
        except Exception as error:
            error.add_note(f"[{len(entries)}]")
            raise
        return tuple(entries)

    return read_tuple


def _build_text(default: str) -> Callable[[Any, Any], str]:
    return lambda value, _: value if isinstance(value, str) else default


def _build_array(converter: cattrs.Converter, hint: Any) -> Callable[[Any, Any], Any]:
    read = converter.get_structure_hook(hint)
    return lambda value, _: () if value is None else read(value, hint)


def _build_object(
    converter: cattrs.Converter, kind: type[Any], **overrides: Any
) -> Callable[[Any, Any], Any]:
    attrs.resolve_types(kind)
    for field in attrs.fields(kind):
        if field.name not in overrides and field.default is not attrs.NOTHING:
            if field.type is str:
                overrides[field.name] = override(struct_hook=_build_text(field.default))
            elif _is_tuple(field.type):
                overrides[field.name] = override(struct_hook=_build_array(converter, field.type))
    read = make_dict_structure_fn(kind, converter, **overrides)

    def read_object(value: Any, _: Any) -> Any:
        if not isinstance(value, dict):
            raise TypeError(f"an object, not {_name(value)}")
        return read(value, kind)

    return read_object


def _flatten(
    converter: cattrs.Converter, kind: type[Analysis], outer: str, name: str
) -> Callable[[Any, Any], Any]:
    """Read a model whose result is nested in an object, or was sent without that object."""
    read = _build_object(converter, kind)

    def read_flat(value: Mapping[str, Any], _: Any) -> Any:
        inner = value.get(outer)
        if inner is None and (outer in value or name in value):
            inner = value
        if not isinstance(inner, dict):
            error = TypeError(f"an object, not {_name(inner)}")
            error.add_note(f".{outer}")
            raise error
        try:
            return read({**inner, "model_version": value.get("model_version")}, kind)
        except Exception as error:
            error.add_note(f".{outer}")
            raise

    return read_flat


def _read_logo_box(value: Any, _: Any) -> tuple[LogoVertex, ...]:
    vertices = value.get("vertices") if isinstance(value, dict) else None
    if not isinstance(vertices, list):
        return ()
    return tuple(
        LogoVertex(_integer_or_zero(vertex.get("x")), _integer_or_zero(vertex.get("y")))
        for vertex in vertices
        if isinstance(vertex, dict)
    )


def _integer_or_zero(value: Any) -> int:
    return value if type(value) is int else 0


@cache
def build_converter() -> cattrs.Converter:
    """Return the converter. Cached."""
    converter = cattrs.Converter()
    # attrs classes first: later registrations take precedence
    converter.register_structure_hook_factory(
        attrs.has, lambda kind: _build_object(converter, kind)
    )
    converter.register_structure_hook_factory(
        _is_optional, lambda hint: _build_optional(converter, hint)
    )
    converter.register_structure_hook_factory(_is_tuple, lambda hint: _build_tuple(converter, hint))
    converter.register_structure_hook(str, _read_string)
    converter.register_structure_hook(float, _read_float)
    converter.register_structure_hook(int, _read_integer)
    converter.register_structure_hook_func(
        lambda kind: isinstance(kind, type) and issubclass(kind, DetectionAnalysis),
        _read_detections,
    )
    converter.register_structure_hook_func(lambda hint: hint == ModelVersion, _read_scalar)
    # built at first use, as for the other classes
    builders: dict[type[Any], Callable[[], Callable[[Any, Any], Any]]] = {
        Logo: lambda: _build_object(
            converter,
            Logo,
            vertices=override(rename="bounding_poly", struct_hook=_read_logo_box),
        ),
        GoogleLogoDetectionAnalysis: lambda: _build_object(
            converter, GoogleLogoDetectionAnalysis, logos=override(rename="logo_annotations")
        ),
        CaptioningAnalysis: lambda: _build_caption(converter),
        GoogleTaggingAnalysis: lambda: _flatten(
            converter, GoogleTaggingAnalysis, "label_annotations", "labels"
        ),
    }
    converter.register_structure_hook_factory(
        lambda kind: kind in builders, lambda kind: builders[kind]()
    )
    converter.register_structure_hook(
        OtherAnalysis,
        lambda value, _: OtherAnalysis(
            raw=value, model_version=_read_scalar(value.get("model_version"), None)
        ),
    )
    return converter


def locate(error: BaseException) -> tuple[str, str]:
    """Return the path of the first leaf of a structuring error, and its reason."""
    path = ""
    for note in reversed(getattr(error, "__notes__", [])):
        if isinstance(note, cattrs.AttributeValidationNote):
            path += f".{_WIRE_NAMES.get(note.name, note.name)}"
        elif note[:1] in {".", "["}:
            path += note
    if isinstance(error, BaseExceptionGroup):
        inner_path, reason = locate(error.exceptions[0])
        return path + inner_path, reason
    if isinstance(error, KeyError):
        return path, "it is missing"
    return path, f"it should be {error}"


_WIRE_NAMES: Final = {"logos": "logo_annotations", "vertices": "bounding_poly"}
