"""Requests, responses and webhooks against the vendor's schema; see `vendor_schema` for the overlay."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from jsonschema import ValidationError
from scripted import SAMPLES, ScriptedServer, answer
from vendor_schema import OVERLAY, Contract, change, find_place, needs_schema, read_vendor_schema

from cloudinary_analyze import MODELS, AnalyzeError, Asset, QuotaExceededError
from cloudinary_analyze._wire.protocol import (
    build_task_failure,
    find_result,
    read_accepted,
    read_error,
    read_result,
    read_task_status,
    reports_progress,
)
from cloudinary_analyze.emulator import Emulator, FaultPlan
from cloudinary_analyze.webhooks import parse_notification

pytestmark = needs_schema

URL = "https://res.cloudinary.com/demo/image/upload/sample.jpg"
PARAMETERS: dict[str, list[dict[str, Any]]] = {
    "ai_vision_general": [{"prompts": ["What?"]}, {"prompts": [f"What {n}?" for n in range(10)]}],
    "ai_vision_moderation": [
        {"rejection_questions": ["Is it?"]},
        {"rejection_questions": [f"Is it {n}?" for n in range(10)]},
    ],
    "ai_vision_tagging": [
        {"tag_definitions": {"a-1": "A cat."}},
        {"tag_definitions": {f"tag-{n}": "A ☂." for n in range(10)}},
    ],
}
# a response requires these fields; all others may be missing
NEEDED = {
    ("data",),
    ("data", "analysis"),
    ("data", "status"),
    ("error",),
}


@pytest.fixture(scope="module")
def contract() -> Contract:
    return Contract()


def build_requests(model: str) -> list[Any]:
    kind = MODELS[model]
    return [
        kind(source, **parameters)
        for source in (URL, Asset("e12345b5c456c8901bbb0efc00c0fcf"))
        for parameters in PARAMETERS.get(model, [{}])
    ]


def test_every_correction_of_the_overlay_is_needed() -> None:
    document = read_vendor_schema()
    for correction in OVERLAY:
        assert correction.found(find_place(document, correction.place)), correction.place
        assert correction.defect
        assert correction.reason
        assert set(correction.provenance) <= set("LDOX, ")


def test_the_schema_has_every_model(contract: Contract) -> None:
    assert sorted(MODELS) == sorted(contract.list_models())


async def test_every_request_fits_the_schema(contract: Contract) -> None:
    async def respond(request: web.Request) -> web.StreamResponse:
        model = request.path.rpartition("/")[2]
        if "/tasks/" in request.path:
            return await answer(sample="task_status_failed")(request)
        if json.loads(await request.read()).get("async"):
            return await answer(202, sample="accepted_202")(request)
        return await answer(sample=model)(request)

    async with ScriptedServer(respond) as server:
        for model in MODELS:
            for request in build_requests(model):
                async with server.session(
                    notifications=asyncio.Queue(),
                    notification_url="https://path.to/webhook?a=1",
                    poll_first=0.001,
                    failure_grace=0,
                ) as session:
                    await session.analyze(request)
                    with pytest.raises(AnalyzeError):
                        await session.submit(request, mode="task")
                async with server.session(notifications=asyncio.Queue(), poll_first=60) as session:
                    await session.submit(request, mode="task").accepted()
    checked = 0
    for seen in server.seen:
        path = seen.path.removeprefix("/v2/analysis/demo")
        contract.find_operation(seen.method, path)
        if seen.method == "POST":
            assert seen.headers["Content-Type"] == "application/json"
            contract.validate(contract.find_request_schema(path), seen.json)
        checked += 1
    assert checked >= 4 * 36
    fields = {key for seen in server.seen if seen.body for key in seen.json}
    assert fields == {"source", "async", "notification_url", "prompts", "rejection_questions",
                      "tag_definitions"}  # fmt: skip


class Prober:
    """Sends requests to an emulator and validates each response."""

    def __init__(self, contract: Contract, emulator: Emulator, http: aiohttp.ClientSession) -> None:
        self.contract, self.emulator, self.http = contract, emulator, http
        self.statuses: set[int] = set()

    async def send(self, method: str, path: str, body: Any = None, **options: Any) -> Any:
        auth = aiohttp.encode_basic_auth(self.emulator.api_key, self.emulator.api_secret)
        headers = {"Authorization": auth, **options.pop("headers", {})}
        cloud = options.pop("cloud", self.emulator.cloud_name)
        url = f"{self.emulator.url}/v2/analysis/{cloud}{path}"
        async with self.http.request(
            method, url, json=body, headers=headers, **options
        ) as response:
            content = await response.json()
            self.statuses.add(response.status)
            schema = self.contract.find_response_schema(method, path, response.status)
            self.contract.validate(schema, content)
            return response.status, content


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession() as session:
        yield session


def build_body(request: Any, **fields: Any) -> dict[str, Any]:
    source = request.source
    named = {"asset_id": source.asset_id} if isinstance(source, Asset) else {"uri": source.uri}
    return {"source": named, **(request.parameters or {}), **fields}


@pytest.mark.parametrize("failed", [False, True])
async def test_every_response_of_the_emulator_fits(
    failed: bool, contract: Contract, http: aiohttp.ClientSession
) -> None:
    deliveries: list[Any] = []
    plan = FaultPlan(failed=float(failed), duplicated=0.5)
    options = {"task_seconds": 0.0, "on_delivery": deliveries.append}
    async with Emulator(faults=plan, **options) as emulator:
        prober = Prober(contract, emulator, http)
        for model in MODELS:
            path = f"/analyze/{model}"
            for request in build_requests(model):
                status, _ = await prober.send("POST", path, build_body(request))
                assert status == 200
                body = build_body(request, **{"async": True})
                status, accepted = await prober.send("POST", path, body)
                assert status == 202
                state = ""
                async with asyncio.timeout(30):
                    while state not in {"completed", "failed"}:
                        _, found = await prober.send("GET", f"/tasks/{accepted['data']['task_id']}")
                        state = found["data"]["status"]
                assert (state == "failed") == failed
    assert prober.statuses == {200, 202}
    payload = {"$ref": "#/components/schemas/AnalysisWebhookPayload"}
    models = set()
    for delivery in deliveries:
        notification = json.loads(delivery.body)
        contract.validate(payload, notification)
        model = emulator.tasks[notification["task_id"]].model
        models.add(model)
        if not failed:  # the schema leaves the shape of `data` open
            schema = contract.find_response_schema("POST", f"/analyze/{model}", 200)
            contract.validate(schema, {"data": notification["data"]})
    assert models == set(MODELS)


async def test_every_refusal_of_the_emulator_fits(
    contract: Contract, http: aiohttp.ClientSession
) -> None:
    good = {"source": {"uri": URL}}
    async with Emulator() as emulator:
        prober = Prober(contract, emulator, http)
        for model in MODELS:
            for body in ({}, [], {"source": 5}, {"source": {}}, {"source": {"uri": "x"}}):
                assert (await prober.send("POST", f"/analyze/{model}", body))[0] == 400
        wrong = {"headers": {"Authorization": "Basic eDp5"}}
        assert (await prober.send("POST", "/analyze/coco", good, **wrong))[0] == 401
        assert (await prober.send("GET", "/tasks/abc", **wrong))[0] == 401
        assert (await prober.send("GET", "/tasks/abc"))[0] == 404
        assert (await prober.send("POST", "/analyze/coco", good, cloud="other"))[0] == 404
        emulator.unsubscribed = frozenset({"object_detection"})
        assert (await prober.send("POST", "/analyze/coco", good))[0] == 403
        emulator.unsubscribed = frozenset()
        emulator.quotas = {"object_detection": 1, "google_tagging": 1, "ai_vision": 1}
        assert (await prober.send("POST", "/analyze/coco", good))[0] == 200
        assert (await prober.send("POST", "/analyze/coco", good))[0] == 429
        emulator.quotas = None
        for fault, expected in (("error_500", 500), ("rate_limited_429", 429)):
            emulator.faults = FaultPlan(**{fault: 1.0})
            body = {"source": {"uri": f"{URL}?{fault}"}}
            assert (await prober.send("POST", "/analyze/coco", body))[0] == expected
    assert prober.statuses == {200, 400, 401, 403, 404, 429, 500}


# -- one optional field left out


def list_variants(contract: Contract, schema: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """Return valid bodies: the whole one, those without one optional field, and those with null."""
    schema = contract.resolve(schema)
    whole = contract.build(schema)
    found = [((), whole)]
    for null, paths in (
        (False, contract.list_optional(schema)),
        (True, contract.list_nullable(schema)),
    ):
        for path in dict.fromkeys(paths):
            if path not in NEEDED:
                found.append((path, change(whole, path, null=null)))
    for _, body in found:
        contract.validate(schema, body)
    return found


@pytest.mark.parametrize("model", MODELS)
async def test_a_response_without_an_optional_field_is_read(model: str, contract: Contract) -> None:
    schema = contract.find_response_schema("POST", f"/analyze/{model}", 200)
    variants = list_variants(contract, schema)
    assert len(variants) > 8
    request = build_requests(model)[0]
    bodies = iter(variants)

    async def respond(received: web.Request) -> web.StreamResponse:
        return await answer(content=next(bodies)[1])(received)

    async with ScriptedServer(respond) as server, server.session() as session:
        for _, body in variants:
            response = await session.analyze(request)
            assert response.raw == body
            repr(response)


def test_a_202_and_a_status_without_a_field_are_read(contract: Contract) -> None:
    accepted = contract.find_response_schema("POST", "/analyze/coco", 202)
    for _, body in list_variants(contract, accepted):
        assert read_accepted(json.dumps(body).encode(), model="coco").task_id == "text"
    status = contract.find_response_schema("GET", "/tasks/a", 200)
    for _, body in list_variants(contract, status):
        assert read_task_status("a", json.dumps(body).encode()).state == "pending"


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 500])
def test_an_error_without_a_field_is_read(status: int, contract: Contract) -> None:
    schema = contract.find_response_schema("POST", "/analyze/coco", status)
    for path, body in list_variants(contract, schema):
        error = read_error(status, {}, json.dumps(body).encode(), now=0, model="coco")
        assert error.status == status
        assert str(error)
        if path == ():
            assert (error.code, error.api_message) == ("text", "text")
    for body in ({}, {"error": None}):
        contract.validate(contract.resolve(schema), body)
        assert read_error(status, {}, json.dumps(body).encode(), now=0).status == status


@pytest.mark.parametrize("model", MODELS)
def test_a_webhook_without_a_field_is_read(model: str, contract: Contract) -> None:
    schema = {"$ref": "#/components/schemas/AnalysisWebhookPayload"}
    kind = MODELS[model]
    response = contract.build(contract.find_response_schema("POST", f"/analyze/{model}", 200))
    for path, body in list_variants(contract, schema):
        for failed in (False, True):
            changed = dict(body)
            if failed:
                changed["http_status"] = 400
            else:
                changed.pop("error", None)
                if "data" in changed:
                    changed["data"] = response["data"]
            contract.validate(schema, changed)
            notification = parse_notification(json.dumps(changed).encode())
            assert notification.task_id == (None if path == ("task_id",) else "text")
            repr(notification)
            if notification.failed:
                error = build_task_failure("a", model=model, notification=notification)
                assert isinstance(error, AnalyzeError | QuotaExceededError)
            elif find_result(notification.raw, kind.analysis_type) is not None:
                assert not reports_progress(notification)
                read_result(model, kind.analysis_type, notification.raw)
            else:
                assert path == ("data",)


def test_the_samples_of_the_contract_fit(contract: Contract) -> None:
    for model in MODELS:
        schema = contract.find_response_schema("POST", f"/analyze/{model}", 200)
        contract.validate(schema, json.loads((SAMPLES / f"{model}.json").read_bytes()))
    for path in SAMPLES.glob("task_status_*.json"):
        schema = contract.find_response_schema("GET", "/tasks/a", 200)
        contract.validate(schema, json.loads(path.read_bytes()))
    for path in SAMPLES.glob("webhook_*.json"):
        schema = {"$ref": "#/components/schemas/AnalysisWebhookPayload"}
        contract.validate(schema, json.loads(path.read_bytes()))
    for path in SAMPLES.glob("error_*.json"):
        status = int(path.name.split("_")[1].removesuffix(".json"))
        schema = contract.find_response_schema("GET", "/tasks/a", status)
        contract.validate(schema, json.loads(path.read_bytes()))


@pytest.mark.parametrize(
    "spoil",
    [
        lambda body: body["source"].update(asset_id="a"),
        lambda body: body.update(prompts=[]),
        lambda body: body.update(unknown=1),
        lambda body: body["source"].update(other=1),
        lambda body: body.pop("source"),
        lambda body: body.update({"async": "yes"}),
    ],
)
def test_invalid_values_are_detected(contract: Contract, spoil: Callable[[Any], Any]) -> None:
    body = build_body(build_requests("ai_vision_general")[0])
    schema = contract.find_request_schema("/analyze/ai_vision_general")
    contract.validate(schema, body)
    spoil(body)
    with pytest.raises(ValidationError):
        contract.validate(schema, body)
