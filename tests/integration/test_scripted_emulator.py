"""Results and errors that a test writes, and the requests that it can assert on."""

from __future__ import annotations

import time

import pytest

from cloudinary_analyze import (
    MODELS,
    AIVisionGeneral,
    AIVisionModeration,
    AIVisionTagging,
    AnalyzeSession,
    ApiError,
    Asset,
    Captioning,
    Coco,
    ConfigurationError,
    Credentials,
    Delivery,
    InvalidRequestError,
    NotFoundError,
    OtherModel,
    QuotaExceededError,
    RateLimitedError,
    ResponseDecodeError,
    Settings,
    parse_notification,
)
from cloudinary_analyze.emulator import FaultPlan
from cloudinary_analyze.testing import (
    ScriptedEmulator,
    build_notification,
    build_response,
    sign_notification,
)
from cloudinary_analyze.webhooks import verify_delivery

URL = "https://images.example/a.jpg"


@pytest.fixture
async def emulator():
    async with ScriptedEmulator() as emulator:
        yield emulator


@pytest.fixture
async def session(emulator):
    settings = Settings(backoff_first=0.001, backoff_max=0.002, attempts=3)
    async with AnalyzeSession(emulator.credentials, settings=settings) as session:
        yield session


def caption(text):
    return {"data": {"caption": text}}


async def get_caption(session, source):
    return (await session.analyze(Captioning(source))).analysis.caption


async def test_a_source_wins_over_its_model(emulator, session):
    emulator.respond(Captioning(Asset("abc")), caption("an asset"))
    emulator.respond(Captioning(URL), caption("a URL"))
    emulator.respond("captioning", caption("anything"))
    found = [await get_caption(session, source) for source in (Asset("abc"), URL, f"{URL}?2")]
    assert found == ["an asset", "a URL", "anything"]
    assert (await session.analyze(Coco(URL))).analysis == build_response(Coco(URL)).analysis


async def test_rules_are_used_in_order_and_the_last_one_stays(emulator, session):
    emulator.respond(Captioning, caption("first"), times=1)
    emulator.respond(Captioning, caption("replaced"))
    emulator.respond(Captioning, caption("then"))
    assert [await get_caption(session, URL) for _ in range(3)] == ["first", "then", "then"]
    emulator.respond(Captioning(URL), caption("once"), times=1)
    assert [await get_caption(session, URL) for _ in range(2)] == ["once", "then"]


async def test_errors_are_not_charged_and_synthetic_results_come_back(emulator, session):
    emulator.respond(Captioning, status=404, times=1)
    emulator.respond(Captioning, status=429, times=3)
    with pytest.raises(NotFoundError):
        await get_caption(session, URL)
    with pytest.raises(RateLimitedError):
        await get_caption(session, URL)
    assert emulator.counts.total_done == 0
    assert await get_caption(session, URL) == build_response(Captioning(URL)).analysis.caption


@pytest.mark.parametrize("status", [400, 418, 420, 499, 500, 599])
async def test_any_error_status_can_be_set(emulator, session, status):
    emulator.respond(Coco, status=status)
    with pytest.raises(ApiError) as caught:
        await session.analyze(Coco(URL))
    assert caught.value.status == status


async def test_requests_are_those_that_were_sent(emulator, session):
    sent = [
        Captioning(URL),
        Coco(Asset("abc")),
        AIVisionGeneral(URL, prompts=["What is it?", "Is it red?"]),
        AIVisionModeration(URL, rejection_questions=["Is it?"]),
        AIVisionTagging(URL, tag_definitions={"cat": "A cat?", "dog": "A dog?"}),
    ]
    for request in sent:
        await session.analyze(request)
    assert emulator.requests == sent


async def test_an_emulator_that_counts_no_sources_keeps_no_requests():
    async with ScriptedEmulator(count_sources=False) as emulator:
        async with AnalyzeSession(emulator.credentials) as session:
            await session.analyze(Captioning(URL))
        assert emulator.requests == []


async def test_quotas_can_be_set_while_it_runs(emulator, session):
    await session.analyze(Coco(URL))
    emulator.quotas = {"object_detection": 1}
    assert (await session.analyze(Coco(URL))).limits[0].remaining == 0
    with pytest.raises(QuotaExceededError):
        await session.analyze(Coco(URL))
    with pytest.raises(ValueError, match="feature"):
        emulator.quotas = {"coco": 1}


async def test_an_emulator_of_several_tests_can_be_reset(emulator):
    emulator.respond(Captioning, status=404)
    emulator.quotas = {"object_detection": 0}
    emulator.faults = FaultPlan(error_500=1.0)
    emulator.reset()
    async with AnalyzeSession(emulator.credentials) as session:
        await session.analyze(Captioning(URL))
    assert emulator.requests == [Captioning(URL)]


@pytest.mark.parametrize("model", MODELS)
async def test_every_model_can_be_scripted(emulator, session, model):
    example = build_response(model)
    emulator.respond(model, example.raw["data"]["analysis"])
    parameters = {
        "ai_vision_general": {"prompts": ["a"]},
        "ai_vision_moderation": {"rejection_questions": ["a"]},
        "ai_vision_tagging": {"tag_definitions": {"a": "b"}},
    }
    request = MODELS[model](f"{URL}?other", **parameters.get(model, {}))
    assert (await session.analyze(request)).analysis == example.analysis


async def test_results_are_copied_and_keep_long_integers(emulator, session):
    found = {"tags": {"cat": [{"confidence": 2**80}]}}
    emulator.respond(Coco, found)
    found["tags"].clear()
    detections = (await session.analyze(Coco(URL))).analysis.detections
    assert [each.confidence for each in detections] == [2**80]


def test_results_that_cannot_be_sent_are_refused_at_once():
    for odd in ({"data": {"caption": {1, 2}}}, [("data", 7, 8)], "caption", 7):
        for build in (ScriptedEmulator().respond, build_response):
            with pytest.raises(InvalidRequestError, match="JSON"):
                build(Captioning, odd)
    emulator = ScriptedEmulator()
    with pytest.raises(ResponseDecodeError):
        emulator.respond(Captioning, {"text": "a cat"})
    for wrong in ("new_model", OtherModel("new", URL), OtherModel):
        with pytest.raises(InvalidRequestError, match="model"):
            emulator.respond(wrong, {})
    for options in (
        {"status": 302},
        {"status": 99},
        {"status": 404, "analysis": caption("a cat")},
        {"times": 0},
    ):
        with pytest.raises(InvalidRequestError):
            emulator.respond(Captioning, **options)


@pytest.mark.parametrize("digest", ["sha1", "sha256"])
def test_signatures_are_those_that_receivers_verify(digest):
    credentials = Credentials(
        "demo", "1", "a", digests=(digest,), notification_secrets=("new", "old")
    )
    body = build_notification("t1", Coco)
    headers = sign_notification(body, credentials)
    verify_delivery(Delivery(body, headers, received_at=time.time()), credentials)
    early = sign_notification(body, credentials, at=1_790_000_000.9)
    assert early["X-Cld-Timestamp"] == "1790000000"
    assert early["X-Cld-Signature"] != headers["X-Cld-Signature"]


def test_only_bytes_and_secrets_sign():
    for wrong in ("{}", {"task_id": "t1"}, bytearray(b"{}")):
        with pytest.raises(TypeError, match="bytes"):
            sign_notification(wrong, Credentials("demo", "1", "a"))
    with pytest.raises(ConfigurationError, match="secret"):
        sign_notification(b"{}", Credentials("demo", oauth_token="x"))


def test_notifications_end_tasks():
    found = parse_notification(build_notification("t1", Captioning(URL), caption("a cat")))
    assert (found.task_id, found.failed) == ("t1", False)
    assert found.raw["data"]["entity"] == URL
    failed = parse_notification(build_notification("t1", "coco", status=503))
    assert (failed.failed, failed.raw["error"]["category"]) == (True, "server_error")
