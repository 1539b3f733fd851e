"""A FastAPI handler returns our values, and its OpenAPI document describes them."""

import json
from typing import Any

import aiohttp
import pytest
from fastapi import FastAPI
from fastapi.encoders import jsonable_encoder
from fastapi.openapi.models import OpenAPI
from notification_support import serve_asgi
from pydantic import BaseModel, TypeAdapter, ValidationError

from cloudinary_analyze import (
    Analysis,
    CaptioningAnalysis,
    CldFashion,
    CldFashionAnalysis,
    Limit,
    Outcome,
    Response,
    SessionStats,
    TaskStatus,
    analyses,
    to_dict,
)


@pytest.fixture
def response(sample: Any) -> Response[CldFashionAnalysis]:
    raw = sample("cld_fashion")
    raw["big"] = 2**80
    return Response.from_raw(CldFashion, raw)


def build_app(response: Response[CldFashionAnalysis]) -> FastAPI:
    app = FastAPI()

    @app.get("/response")
    async def get_response() -> Response[CldFashionAnalysis]:
        return response

    @app.get("/analysis")
    async def get_analysis() -> CldFashionAnalysis:
        return response.analysis

    @app.get("/any")
    async def get_any() -> Response[Any]:
        return response

    @app.get("/list")
    async def get_list() -> list[Response[CldFashionAnalysis]]:
        return [response]

    @app.get("/limits")
    async def get_limits() -> dict[str, tuple[Limit, ...]]:
        return {"all": response.limits}

    @app.get("/stats")
    async def get_stats() -> SessionStats | TaskStatus:
        return SessionStats(calls=1)

    app.add_api_route("/untyped", lambda: {"found": response}, response_model=None)
    return app


EXPECTED: dict[str, Any] = {
    "/response": to_dict,
    "/analysis": lambda response: to_dict(response.analysis),
    "/any": to_dict,
    "/list": lambda response: [to_dict(response)],
    "/limits": lambda response: {"all": [to_dict(limit) for limit in response.limits]},
    "/stats": lambda _: to_dict(SessionStats(calls=1)),
    "/untyped": lambda response: {"found": to_dict(response)},
}


async def test_a_handler_returns_a_value(response: Response[CldFashionAnalysis]) -> None:
    async with serve_asgi(build_app(response)) as origin, aiohttp.ClientSession(origin) as client:
        for path, expected in EXPECTED.items():
            async with client.get(path) as got:
                assert (got.status, await got.json()) == (200, expected(response))


def find_schema(document: dict[str, Any], path: str) -> dict[str, Any]:
    answer = document["paths"][path]["get"]["responses"]["200"]
    schema: dict[str, Any] = answer["content"]["application/json"]["schema"]
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    return schema


def test_openapi_shows_the_schema(response: Response[CldFashionAnalysis]) -> None:
    document = build_app(response).openapi()
    assert document["openapi"].startswith("3.1")
    assert OpenAPI.model_validate(document).paths
    schema = find_schema(document, "/response")
    assert list(schema["properties"]) == ["model", "entity", "request_id", "limits", "analysis"]
    detection = schema["properties"]["analysis"]["properties"]["detections"]["items"]
    assert detection["title"] == "Detection"
    assert detection["properties"]["label"] == {"type": "string"}
    assert find_schema(document, "/analysis")["title"] == "CldFashionAnalysis"
    assert find_schema(document, "/any")["properties"]["analysis"] == {}
    for path, expected in EXPECTED.items():
        check(expected(response), find_schema(document, path))


def test_the_openapi_document_is_valid(response: Response[CldFashionAnalysis]) -> None:
    validator = pytest.importorskip("openapi_spec_validator")
    validator.validate(build_app(response).openapi())


def check(value: Any, schema: dict[str, Any]) -> None:
    """Check that a value is what a JSON Schema says, as far as we use the language."""
    types = {dict: "object", list: "array", str: "string", type(None): "null", bool: "boolean"}
    if "anyOf" in schema:
        branches = [branch for branch in schema["anyOf"] if fits(value, branch)]
        assert branches, (value, schema)
    elif "type" in schema:
        numbers = {"number"} | ({"integer"} if isinstance(value, int) else set())
        assert schema["type"] in ({types[type(value)]} if type(value) in types else numbers)
    if isinstance(value, dict):
        assert set(schema.get("required", ())) <= set(value)
        for name, inner in schema.get("properties", {}).items():
            check(value[name], inner)
        if isinstance(schema.get("additionalProperties"), dict):
            for inner in value.values():
                check(inner, schema["additionalProperties"])
    if isinstance(value, list):
        for inner in value:
            check(inner, schema.get("items", {}))


def fits(value: Any, schema: dict[str, Any]) -> bool:
    try:
        check(value, schema)
    except AssertionError:
        return False
    return True


@pytest.mark.parametrize(
    "kind",
    [k for k in vars(analyses).values() if isinstance(k, type) and issubclass(k, Analysis)],
    ids=lambda kind: kind.__name__,
)
def test_every_analysis_has_a_schema_with_all_its_keys(kind: type[Analysis]) -> None:
    adapter = TypeAdapter(Response[kind])  # type: ignore[valid-type]
    for mode in ("validation", "serialization"):
        schema = adapter.json_schema(mode=mode)["properties"]["analysis"]
        assert schema["title"] == kind.__name__
        assert "model_version" in schema["required"]
        json.dumps(schema)


def test_a_pydantic_model_holds_a_value(response: Response[CldFashionAnalysis]) -> None:
    class Page(BaseModel):
        found: Response[CldFashionAnalysis] | None
        analysis: CaptioningAnalysis | CldFashionAnalysis

    page = Page(found=response, analysis=response.analysis)
    assert page.found is response
    assert page.model_dump(mode="json")["found"] == to_dict(response)
    assert json.loads(page.model_dump_json())["analysis"] == to_dict(response.analysis)
    with pytest.raises(ValidationError):
        Page(found=to_dict(response), analysis=response.analysis)  # type: ignore[arg-type]
    assert "Detection" in json.dumps(Page.model_json_schema())


def test_an_outcome_has_a_schema(response: Response[CldFashionAnalysis]) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(Outcome[str, CldFashionAnalysis])
    schema = json.dumps(adapter.json_schema(mode="serialization"))
    assert "Response[CldFashionAnalysis]" in schema
    assert "ambiguous" in schema


def test_hostile_values_are_returned_too() -> None:
    response = Response.from_raw(CldFashion, {"data": {"analysis": {"tags": {"\ud800": []}}}})
    caption = CaptioningAnalysis(caption="half \ud800", model_version=float("nan"))
    for value in (response, caption):
        json.dumps(jsonable_encoder(value), allow_nan=False, ensure_ascii=False).encode()
        assert TypeAdapter(type(value)).dump_json(value)
