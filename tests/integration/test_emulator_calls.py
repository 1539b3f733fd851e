"""The emulator answers calls as the service does, over a real socket."""

import asyncio
import gc
import io
import json
import random
from datetime import UTC, datetime

import aiohttp
import pytest

from cloudinary_analyze.emulator import Emulator, FaultPlan
from cloudinary_analyze.emulator.models import MODELS

URI = "https://x.test/a.jpg"
LISTS = {
    "prompts": ["Describe this image", "Is there an insect?"],
    "rejection_questions": ["Is there any nudity?"],
    "tag_definitions": [{"name": "pack-of-2", "description": "Is there a pack of two?"}],
}


def test_an_emulator_cannot_be_taken_for_an_account():
    with pytest.raises(ValueError, match="begins with 'emulator-'"):
        Emulator(cloud_name="demo")


def open_client(emulator, **headers):
    basic = aiohttp.encode_basic_auth(emulator.api_key, emulator.api_secret)
    return aiohttp.ClientSession(headers={"Authorization": basic, **headers})


def build_body(model, uri=URI):
    name = MODELS[model].list_field if model in MODELS else None
    return {"source": {"uri": uri}, **({name: LISTS[name]} if name else {})}


async def call(client, emulator, model="captioning", body=None, *, cloud=None):
    url = f"{emulator.url}/v2/analysis/{cloud or emulator.cloud_name}/analyze/{model}"
    async with client.post(url, json=build_body(model) if body is None else body) as response:
        return response.status, await response.json()


def skeleton(value):
    """The shape of a value: keys and types, each list by its first item."""
    if isinstance(value, dict):
        return {key: skeleton(item) for key, item in value.items()}
    if isinstance(value, list):
        return [skeleton(value[0])] if value else []
    return float if isinstance(value, float | int) else type(value)


def sample(request, name):
    return json.loads((request.config.rootpath / "tests" / "samples" / f"{name}.json").read_text())


@pytest.mark.parametrize("model", [*MODELS, "google_logo_detections"])
async def test_every_model_answers_in_the_shape_of_its_sample(model, request):
    expected = sample(request, model.removesuffix("s") if model not in MODELS else model)
    async with Emulator() as emulator, open_client(emulator) as client:
        source = emulator.sample_url(3)
        status, body = await call(client, emulator, model, build_body(model, source))
    assert status == 200
    assert body["data"]["entity"] == source
    assert len(body["request_id"]) == 32
    ours, theirs = body["data"].pop("analysis"), expected["data"].pop("analysis")
    assert skeleton(body) == skeleton(expected)
    assert set(ours) == set(theirs)
    assert ours.get("model_version") == theirs.get("model_version")
    if isinstance(theirs.get("tags"), dict):
        entries = [entry for group in ours["tags"].values() for entry in group]
        allowed = {"bounding-box", "categories", "confidence", "attributes"}
        assert entries
        assert all({"categories", "confidence"} <= set(entry) <= allowed for entry in entries)
    elif model != "ai_vision_tagging":
        for logo in ours.get("logo_annotations", ()):
            logo.setdefault("mid", "the service leaves it out for some logos")
        assert skeleton(ours) == skeleton(theirs)


async def test_the_entity_is_the_source_as_sent_also_for_an_asset():
    async with Emulator() as emulator, open_client(emulator) as client:
        _, body = await call(client, emulator, body={"source": {"uri": "https://x.test/ä?b=%20"}})
        assert body["data"]["entity"] == "https://x.test/ä?b=%20"
        _, body = await call(client, emulator, body={"source": {"asset_id": "e12345"}})
        assert body["data"]["entity"] == "e12345"


@pytest.mark.parametrize(
    ("authorization", "cloud", "status"),
    [
        (None, None, 401),
        ("Basic d3Jvbmc6d3Jvbmc=", None, 401),
        ("Bearer wrong", None, 401),
        ("bearer emulator-oauth-token", None, 200),
        ("Bearer emulator-oauth-token", "another", 404),
    ],
)
async def test_credentials_are_checked(authorization, cloud, status):
    headers = {"Authorization": authorization} if authorization else {}
    async with Emulator() as emulator, aiohttp.ClientSession(headers=headers) as client:
        found, body = await call(client, emulator, cloud=cloud)
    assert found == status
    assert status == 200 or set(body["error"]) == {
        "category", "code", "message", "details", "request_id",
    }  # fmt: skip


def tags(*names):
    definitions = [{"name": name, "description": "d"} for name in names]
    return {"source": {"uri": URI}, "tag_definitions": definitions}


@pytest.mark.parametrize(
    ("model", "body", "code", "detail"),
    [
        ("captioning", {}, "MA_00001", ["source"]),
        ("captioning", {"source": {}}, "MA_00001", ["uri"]),
        ("ai_vision_general", {}, "MA_00001", ["source", "prompts"]),
        ("ai_vision_tagging", {"source": {"uri": URI}}, "MA_00001", ["tag_definitions"]),
        (
            "ai_vision_tagging",
            {"source": {"uri": URI}, "tag_definitions": [{"name": "a"}]},
            "MA_00001",
            ["tag_definitions[0].description"],
        ),
        ("captioning", [], "MA_00003", "JSON object"),
        ("captioning", {"source": "a"}, "MA_00003", "source must be an object"),
        ("captioning", {"source": {"uri": URI, "asset_id": "a"}}, "MA_00003", "exactly one"),
        ("captioning", {"source": {"uri": "sample"}}, "MA_00003", "http or https"),
        ("captioning", {"source": {"uri": None}}, "MA_00003", "http or https"),
        ("captioning", {"source": {"asset_id": ""}}, "MA_00003", "not empty"),
        ("captioning", {"source": {"uri": URI}, "async": "yes"}, "MA_00003", "boolean"),
        ("captioning", {"source": {"uri": URI}, "notification_url": "ftp://x"}, "MA_00003", "http"),
        (
            "captioning",
            {"source": {"uri": URI}, "notification_url": "poll://x"},
            "MA_00003",
            "http",
        ),
        ("ai_vision_general", {"source": {"uri": URI}, "prompts": []}, "MA_00003", "1 to 10"),
        (
            "ai_vision_moderation",
            {"source": {"uri": URI}, "rejection_questions": ["a"] * 11},
            "MA_00003",
            "1 to 10",
        ),
        ("ai_vision_general", {"source": {"uri": URI}, "prompts": [1]}, "MA_00003", "strings"),
        ("ai_vision_tagging", tags("not_this"), "MA_00003", "lower-case alphanumeric"),
        ("ai_vision_tagging", tags("fine", "Not"), "MA_00003", "lower-case alphanumeric"),
    ],
)
async def test_a_refusal_names_the_broken_rule(model, body, code, detail):
    async with Emulator() as emulator, open_client(emulator) as client:
        status, answer = await call(client, emulator, model, body)
    assert status == 400
    assert answer["error"]["code"] == code
    details = answer["error"]["details"]
    assert details.get("parameters") == detail or detail in details.get("message", "")
    assert emulator.counts.total_received == 0


async def test_invalid_json_and_large_or_unknown_requests_get_the_services_errors():
    async with Emulator() as emulator, open_client(emulator) as client:
        base = f"{emulator.url}/v2/analysis/{emulator.cloud_name}"
        as_json = {"Content-Type": "application/json"}
        cases = [
            ("POST", f"{base}/analyze/captioning", b"{nope", as_json, 400),
            ("POST", f"{base}/analyze/captioning", b"\xff\xfe", as_json, 400),
            ("POST", f"{base}/analyze/captioning", b"[" * 100_000, as_json, 400),
            ("POST", f"{base}/analyze/captioning", b"{}", {"Content-Type": "text/plain"}, 400),
            ("POST", f"{base}/analyze/captioning", io.BytesIO(b" " * 1_100_000), as_json, 413),
            ("POST", f"{base}/analyze/custom", b"{}", as_json, 404),
            ("GET", f"{base}/analyze/captioning", None, {}, 404),
            ("GET", f"{base}/tasks/0", None, {}, 404),
            ("POST", f"{emulator.url}/v2/emulator-demo/analysis/analyze/uri", b"{}", as_json, 404),
        ]
        for method, url, data, headers, status in cases:
            async with client.request(method, url, data=data, headers=headers) as response:
                assert response.status == status, url
                assert (await response.json())["error"]["message"]
                assert "synthetic" in response.headers["Server"]


async def test_garbage_never_causes_a_500():
    rng = random.Random(4)
    values = [None, True, -1, 1e300, "", "\ud7ff", "http://", "poll://", [], {}, ["x"], {"uri": {}}]

    def garble(depth=3):
        if depth == 0 or rng.random() < 0.3:
            return rng.choice(values)
        keys = ["source", "uri", "asset_id", "prompts", "async", "notification_url"]
        keys += ["tag_definitions", "name"]
        return {rng.choice(keys): garble(depth - 1) for _ in range(3)}

    async with Emulator() as emulator, open_client(emulator) as client:
        for _ in range(300):
            status, _ = await call(client, emulator, rng.choice([*MODELS]), garble())
            assert status in {200, 202, 400}


async def test_a_quota_decreases_and_then_gives_429():
    reset = datetime(2026, 12, 1, tzinfo=UTC)
    quotas = {"object_detection": 3}
    async with (
        Emulator(quotas=quotas, reset_time=reset) as emulator,
        open_client(emulator) as client,
    ):
        answers = [await call(client, emulator) for _ in range(4)]
        unlimited, _ = await call(client, emulator, "google_tagging")
    assert [status for status, _ in answers] == [200, 200, 200, 429]
    entries = [body["limits"]["addons_quota"][0] for _, body in answers]
    assert [entry["remaining"] for entry in entries] == [2, 1, 0, 0]
    assert [entry["used_by_request"] for entry in entries] == [1, 1, 1, 0]
    assert entries[3]["reset_time"] == "2026-12-01T00:00:00Z"
    assert answers[3][1]["error"]["code"] == "MA_00008"
    assert unlimited == 200
    assert emulator.counts.done["captioning", URI] == 3
    assert emulator.counts.received["captioning", URI] == 4


async def test_ai_vision_costs_tokens_in_the_measured_ranges():
    ten = [{"name": f"t{index}", "description": "d"} for index in range(10)]
    async with Emulator() as emulator, open_client(emulator) as client:
        for model, extra, low, high in [
            ("ai_vision_general", {"prompts": ["a"]}, 690, 756),
            ("ai_vision_general", {"prompts": ["a"] * 4}, 1281, 1306),
            ("ai_vision_tagging", {"tag_definitions": ten[:1]}, 535, 880),
            ("ai_vision_tagging", {"tag_definitions": ten}, 535, 880),
        ]:
            body = {"source": {"uri": URI}, **extra}
            _, answer = await call(client, emulator, model, body)
            assert low <= answer["limits"]["addons_quota"][0]["used_by_request"] <= high


async def test_a_feature_that_is_not_subscribed_is_403():
    async with (
        Emulator(unsubscribed={"ai_vision"}) as emulator,
        open_client(emulator) as client,
    ):
        status, body = await call(client, emulator, "ai_vision_general")
        other, _ = await call(client, emulator)
    assert (status, other) == (403, 200)
    assert body["error"]["code"] == "MA_00007"
    assert body["error"]["details"] == {"feature_name": "ai_vision"}


async def test_gallery_pictures_are_served_and_a_missing_one_cannot_be_analyzed():
    async with Emulator() as emulator, open_client(emulator) as client:
        async with client.get(emulator.sample_urls(3)[2]) as response:
            assert response.content_type == "image/png"
            assert (await response.read()).startswith(b"\x89PNG")
        async with client.get(f"{emulator.url}/samples/") as response:
            assert "0.png" in await response.text()
        missing = f"{emulator.url}/samples/none.png"
        async with client.get(missing) as response:
            assert response.status == 404
        status, _ = await call(client, emulator, body={"source": {"uri": missing}})
        assert status == 404
        assert emulator.counts.total_done == 0
        assert "synthetic" in emulator.banner()


@pytest.mark.parametrize(
    ("fault", "status", "done"),
    [
        ("error_500", 500, 0),
        ("error_502_html", 502, 0),
        ("error_503", 503, 0),
        ("rate_limited_429", 429, 0),
        ("reset_connection", None, 0),
        ("drop_response", None, 1),
        ("truncated_json", 200, 1),
        ("slow", 200, 1),
    ],
)
async def test_a_fault_occurs_as_often_as_planned(fault, status, done):
    plan = FaultPlan(**{fault: 1.0}, fault_times=2, retry_after=0.5, slow_seconds=0.2)
    async with Emulator(faults=plan) as emulator, open_client(emulator) as client:
        url = f"{emulator.url}/v2/analysis/{emulator.cloud_name}/analyze/coco"
        for _ in range(2):
            started = asyncio.get_running_loop().time()
            try:
                async with client.post(url, json={"source": {"uri": URI}}) as response:
                    assert response.status == status
                    text = await response.text()
            except aiohttp.ClientConnectionError as error:
                assert status is None
                disconnected = isinstance(error, aiohttp.ServerDisconnectedError)
                assert disconnected == (fault == "drop_response")
                continue
            if fault in {"error_503", "rate_limited_429"}:
                assert response.headers["Retry-After"] == "0.5"
            if fault == "truncated_json":
                with pytest.raises(ValueError, match=r"Unterminated|Expecting|delimiter"):
                    json.loads(text)
            elif fault == "slow":
                assert asyncio.get_running_loop().time() - started >= 0.2
            elif fault == "error_502_html":
                assert response.content_type == "text/html"
        assert emulator.counts.total_done == 2 * done
        assert (await call(client, emulator, "coco"))[0] == 200
        assert emulator.counts.http_faults == {fault: 2}
        assert emulator.counts.received["coco", URI] == 3


async def test_concurrent_latencies_overlap_and_are_counted():
    async with Emulator(latency=1) as emulator, open_client(emulator) as client:
        started = asyncio.get_running_loop().time()
        await asyncio.gather(*(call(client, emulator) for _ in range(20)))
        assert 1 <= asyncio.get_running_loop().time() - started < 20
    assert emulator.counts.max_in_flight == 20
    assert emulator.counts.in_flight == 0


async def test_stopping_leaves_nothing_behind_even_with_calls_in_flight():
    before = asyncio.all_tasks()
    async with aiohttp.ClientSession() as client:
        async with Emulator(latency=60) as emulator:
            basic = aiohttp.encode_basic_auth(emulator.api_key, emulator.api_secret)
            client.headers["Authorization"] = basic
            calls = [asyncio.create_task(call(client, emulator)) for _ in range(5)]
            while emulator.counts.in_flight < 5:
                await asyncio.sleep(0.01)
        results = await asyncio.gather(*calls, return_exceptions=True)
    assert all(isinstance(result, aiohttp.ClientError) for result in results)
    assert asyncio.all_tasks() == before
    gc.collect()
