"""The vendor's OpenAPI schema, whose file `ANALYZE_OPENAPI` names, and the overlay for its defects.

The schema is not part of this repository. Objects are closed for validation: a field that neither the
schema nor the overlay has is an error.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import attrs
import pytest
import yaml
from jsonschema import Draft202012Validator, FormatChecker

VARIABLE = "ANALYZE_OPENAPI"
FILE = os.environ.get(VARIABLE, "")
needs_schema = pytest.mark.skipif(not FILE, reason=f"{VARIABLE} does not name the vendor's schema")

Document = dict[str, Any]


@attrs.frozen
class Correction:
    """A defect of the schema and its correction.

    Attributes:
        place: Where the defect is, as the keys that lead to it.
        defect: The schema's faulty rule.
        reason: Why the rule is wrong or incomplete.
        provenance: How it is known, as in the contract notes: L measured live, D documented, O the
            schema itself, X chosen by the emulator, because nothing is known.
        correct: A function that changes the value at the place.
        found: Whether the schema still has the defect. If not, the correction must be removed.
    """

    place: str
    defect: str
    reason: str
    provenance: str
    correct: Callable[[Any], object]
    found: Callable[[Any], bool]


def build_requirement(*names: str) -> dict[str, Callable[[Any], Any]]:
    """Replace the list of required properties."""
    return {
        "correct": lambda value: value.update(required=list(names)),
        "found": lambda value: value.get("required", []) != list(names),
    }


def build_rule(**rules: Any) -> dict[str, Callable[[Any], Any]]:
    """Add rules that are missing."""
    return {
        "correct": lambda value: value.update(rules),
        "found": lambda value: not rules.keys() <= value.keys(),
    }


# spelled out, because the dialects of regular expressions differ in what `\\s` and `$` match
_SPACE = r"\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
HTTP_URL = f"^[Hh][Tt][Tt][Pp][Ss]?://[^{_SPACE}/?#]+([/?#][^{_SPACE}]*)?$(?!\\n)"
SCHEMAS = "components/schemas"
OVERLAY = (
    Correction(
        f"{SCHEMAS}/ImageQualityAnalysisData",
        "`required: [tags]`, but there is no property `tags`",
        "copied from another model; the examples have no tags",
        "O",
        **build_requirement("quality"),
    ),
    Correction(
        f"{SCHEMAS}/WatermarkDetectionAnalysisData",
        "`required: [tags]`, but there is no property `tags`",
        "copied from another model; the examples have no tags",
        "O",
        **build_requirement("detections"),
    ),
    Correction(
        f"{SCHEMAS}/GetTaskStatusResponse",
        "`required: [status]` at the top level, but `status` is a property of `data`",
        "the example has no `status` at the top level",
        "O",
        correct=lambda value: (
            value.update(required=["data"]),
            value["properties"]["data"].update(required=["status"]),
        ),
        found=lambda value: value.get("required") == ["status"],
    ),
    Correction(
        f"{SCHEMAS}/AIVisionModerationAnalysisData/properties/responses/items/properties/value",
        "`enum: [yes, no, unknown]`, unquoted: YAML 1.1 reads booleans",
        "the service sends the strings",
        "O, D",
        correct=lambda value: value.update(enum=["yes", "no", "unknown"]),
        found=lambda value: True in value["enum"],
    ),
    Correction(
        f"{SCHEMAS}/AnalyzeAIVisionGeneralRequest/allOf/1/properties/prompts/items",
        "the example of a prompt is an array, and its type is string",
        "the type is right, as the request examples show",
        "O",
        correct=lambda value: value.pop("example"),
        found=lambda value: isinstance(value.get("example"), list),
    ),
    Correction(
        f"{SCHEMAS}/BaseAnalyzeRequest",
        "no type, so that null and arrays fit",
        "the body is a JSON object",
        "D",
        **build_rule(type="object"),
    ),
    Correction(
        f"{SCHEMAS}/AnalyzeAIVisionGeneralRequest/allOf/1",
        "`prompts` is optional",
        "without prompts there is nothing to answer",
        "X",
        **build_requirement("prompts"),
    ),
    Correction(
        f"{SCHEMAS}/AnalyzeAIVisionModerationRequest/allOf/1",
        "`rejection_questions` is optional",
        "without questions there is nothing to answer",
        "X",
        **build_requirement("rejection_questions"),
    ),
    Correction(
        f"{SCHEMAS}/AnalyzeAIVisionTaggingRequest/allOf/1/properties/tag_definitions/items"
        "/properties/name",
        "any string",
        "other characters than a-z, 0-9 and - are refused with MA_00003",
        "L",
        **build_rule(pattern=r"^[a-z0-9-]+$(?!\n)"),
    ),
    Correction(
        f"{SCHEMAS}/Source/properties/uri",
        "any URI",
        "only http and https URLs can be fetched",
        "D",
        **build_rule(pattern=HTTP_URL),
    ),
    Correction(
        f"{SCHEMAS}/Source/properties/asset_id",
        "any string",
        "an empty id names nothing",
        "X",
        **build_rule(minLength=1),
    ),
    Correction(
        f"{SCHEMAS}/BaseAnalyzeRequest/properties/notification_url",
        "any string",
        "only http and https URLs can be notified",
        "X",
        **build_rule(pattern=HTTP_URL),
    ),
    Correction(
        f"{SCHEMAS}/LimitsObject/properties",
        "`limits` has `items`",
        "the live service sends `addons_quota`",
        "L",
        correct=lambda value: value.update(addons_quota=value["items"]),
        found=lambda value: "addons_quota" not in value,
    ),
    Correction(
        "paths/~1analyze~1google_logo_detection/post/responses",
        "no 202, although the body has `async`",
        "the guide names no model without tasks",
        "X",
        correct=lambda value: value.update(
            {"202": {"$ref": "#/components/responses/AnalysisAcceptedResponse"}}
        ),
        found=lambda value: "202" not in value,
    ),
)


def find_place(document: Document, place: str) -> Any:
    value: Any = document
    for key in place.split("/"):
        name = key.replace("~1", "/")
        value = value[int(name)] if isinstance(value, list) else value[name]
    return value


def read_vendor_schema() -> Document:
    document: Document = yaml.safe_load(Path(FILE).read_text(encoding="utf-8"))
    return document


def read_corrected_schema() -> Document:
    document = read_vendor_schema()
    for correction in OVERLAY:
        correction.correct(find_place(document, correction.place))
    return document


# -- validation


FORMATS = FormatChecker(formats=())
FORMATS.checks("uri", ValueError)(
    lambda value: not isinstance(value, str) or bool(urlsplit(value).scheme)
)
FORMATS.checks("date-time", ValueError)(
    lambda value: not isinstance(value, str) or bool(datetime.fromisoformat(value))
)


def _convert(schema: Any, *, closed: bool) -> Any:
    """Convert an OpenAPI 3.0 schema to JSON Schema 2020-12, with closed objects."""
    if isinstance(schema, list):
        return [_convert(entry, closed=closed) for entry in schema]
    if not isinstance(schema, dict):
        return schema
    found = {
        key: {name: _convert(inner, closed=True) for name, inner in value.items()}
        if key == "properties"
        else _convert(value, closed=key == "items")
        for key, value in schema.items()
        if key not in {"nullable", "example", "examples"}
    }
    if schema.get("nullable"):
        found["type"] = [found.get("type", "object"), "null"]
    if closed and ("$ref" in schema or "allOf" in schema or "properties" in schema):
        found["unevaluatedProperties"] = False
    return found


class Contract:
    """The corrected schema, ready to validate bodies."""

    def __init__(self) -> None:
        self.document = read_corrected_schema()
        self._components = {"schemas": {}, "responses": {}}
        for name, schema in self.document["components"]["schemas"].items():
            self._components["schemas"][name] = _convert(schema, closed=False)
        self._validators: dict[str, Draft202012Validator] = {}

    def find_operation(self, method: str, path: str) -> Document:
        """Return the operation of a path below the base URL."""
        if path.startswith("/tasks/"):
            path = "/tasks/{task_id}"
        operation: Document = self.document["paths"][path][method.lower()]
        return operation

    def list_models(self) -> list[str]:
        return [p.removeprefix("/analyze/") for p in self.document["paths"] if "/analyze/" in p]

    def find_request_schema(self, path: str) -> Document:
        body = self.find_operation("POST", path)["requestBody"]
        schema: Document = body["content"]["application/json"]["schema"]
        return schema

    def find_response_schema(self, method: str, path: str, status: int) -> Document:
        response = self.find_operation(method, path)["responses"][str(status)]
        schema: Document = self.resolve(response)["content"]["application/json"]["schema"]
        return schema

    def resolve(self, value: Document) -> Document:
        while "$ref" in value:
            value = find_place(self.document, value["$ref"].removeprefix("#/"))
        return value

    def validate(self, schema: Document, value: Any) -> None:
        """Raise if a value does not fit a schema of the document, or has unknown fields."""
        name = repr(schema)
        if name not in self._validators:
            whole = _convert(schema, closed=True) | {"components": self._components}
            self._validators[name] = Draft202012Validator(whole, format_checker=FORMATS)
        self._validators[name].validate(value)

    # -- generation

    def build(self, schema: Document) -> Any:
        """Return a value of a schema with every field that it has."""
        schema = self.resolve(schema)
        if "allOf" in schema:
            merged: dict[str, Any] = {}
            for part in schema["allOf"]:
                merged |= self.build(part) or {}
            return merged
        if "enum" in schema:
            return schema["enum"][0]
        if "properties" in schema:
            return {name: self.build(inner) for name, inner in schema["properties"].items()}
        match schema.get("type"):
            case "array":
                return [self.build(schema["items"])]
            case "string":
                return "2024-01-20T12:34:56Z" if schema.get("format") == "date-time" else "text"
            case "integer":
                return 1
            case "number":
                return 0.5
            case "boolean":
                return True
        return {"free": [1]}

    def list_optional(
        self, schema: Document, path: tuple[Any, ...] = ()
    ) -> Iterator[tuple[Any, ...]]:
        """Yield the path of each field that may be left out."""
        schema = self.resolve(schema)
        for part in schema.get("allOf", ()):
            yield from self.list_optional(part, path)
        for name, inner in schema.get("properties", {}).items():
            if name not in schema.get("required", ()):
                yield (*path, name)
            yield from self.list_optional(inner, (*path, name))
        if "items" in schema and isinstance(schema["items"], dict) and "type" in schema:
            yield from self.list_optional(schema["items"], (*path, 0))

    def list_nullable(
        self, schema: Document, path: tuple[Any, ...] = ()
    ) -> Iterator[tuple[Any, ...]]:
        """Yield the path of each field that may be null."""
        schema = self.resolve(schema)
        if schema.get("nullable") and path:
            yield path
        for part in schema.get("allOf", ()):
            yield from self.list_nullable(part, path)
        for name, inner in schema.get("properties", {}).items():
            yield from self.list_nullable(inner, (*path, name))
        if isinstance(schema.get("items"), dict) and schema.get("type") == "array":
            yield from self.list_nullable(schema["items"], (*path, 0))


def change(value: Any, path: tuple[Any, ...], *, null: bool) -> Any:
    """Return a copy without a field, or with null in its place."""
    value = copy.deepcopy(value)
    inner = value
    for key in path[:-1]:
        inner = inner[key]
    if null:
        inner[path[-1]] = None
    else:
        del inner[path[-1]]
    return value
