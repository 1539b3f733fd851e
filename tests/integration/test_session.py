"""The session over a real socket: its requests, its responses, and their types."""

from __future__ import annotations

import asyncio
import base64
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from scripted import CAPTION, KEY, SECRET, URL, ScriptedServer, answer, busy, requests_of, until

from cloudinary_analyze import (
    MODELS,
    AIVisionTagging,
    AnalyzeSession,
    Asset,
    BulkStoppedError,
    CallTimeoutError,
    Captioning,
    Coco,
    ConfigurationError,
    Credentials,
    GoogleLogoDetection,
    InvalidRequestError,
    OtherModel,
    Settings,
    TagDefinition,
    TaskTimeoutError,
)
from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.testing import ManualClock

PARAMETERS: dict[str, dict[str, Any]] = {
    "ai_vision_general": {"prompts": ["Describe this image"]},
    "ai_vision_moderation": {"rejection_questions": ["Is there any nudity?"]},
    "ai_vision_tagging": {"tag_definitions": [TagDefinition("cat", "Is there a cat?")]},
}


@pytest.mark.parametrize("model", MODELS)
async def test_every_model_is_called_at_its_path(model: str) -> None:
    async with ScriptedServer(answer(sample=model)) as server, server.session() as session:
        request = MODELS[model](URL, **PARAMETERS.get(model, {}))
        response = await session.analyze(request)
    (seen,) = server.seen
    assert (seen.method, seen.path) == ("POST", f"/v2/analysis/demo/analyze/{model}")
    assert seen.json["source"] == {"uri": URL}
    assert seen.json.keys() == {"source", *request.parameters}
    assert seen.headers["Content-Type"] == seen.headers["Accept"] == "application/json"
    assert seen.headers["User-Agent"].startswith("cloudinary-analyze/")
    assert type(response.analysis) is MODELS[model].analysis_type


async def test_key_and_secret_are_basic_authentication() -> None:
    credentials = Credentials("demo", KEY, "ä/secret:with@odd")
    async with ScriptedServer(CAPTION) as server:
        async with server.session(credentials=credentials) as session:
            await session.analyze(Captioning(URL))
    scheme, _, value = server.seen[0].headers["Authorization"].partition(" ")
    assert scheme == "Basic"
    assert base64.b64decode(value).decode() == f"{KEY}:ä/secret:with@odd"


async def test_an_oauth_token_wins_over_key_and_secret() -> None:
    credentials = Credentials("demo", KEY, SECRET, oauth_token="tok-en")
    async with ScriptedServer(CAPTION) as server:
        async with server.session(credentials=credentials) as session:
            await session.analyze(Captioning(URL))
    assert server.seen[0].headers["Authorization"] == "Bearer tok-en"


async def test_an_asset_and_an_unknown_model_are_sent_as_they_are() -> None:
    content = {"data": {"analysis": {"answer": 42}}}
    async with ScriptedServer(answer(content=content)) as server, server.session() as session:
        response = await session.analyze(OtherModel("new-model.v2", Asset("abc"), {"depth": 3}))
    assert response.analysis.raw == {"answer": 42}
    assert server.seen[0].path == "/v2/analysis/demo/analyze/new-model.v2"
    assert server.seen[0].json == {"source": {"asset_id": "abc"}, "depth": 3}


async def test_the_host_of_the_settings_wins_over_the_credentials(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with ScriptedServer(CAPTION) as server:
        monkeypatch.setenv("CLOUDINARY_URL", f"cloudinary://1:a@demo?upload_prefix={server.url}")
        async with AnalyzeSession() as session:
            await session.analyze(Captioning(URL))
        wrong = Credentials("demo", KEY, SECRET, host="http://127.0.0.1:1")
        async with AnalyzeSession(wrong, settings=Settings(host=server.url)) as session:
            await session.analyze(Captioning(URL))
    assert len(server.seen) == 2


async def test_no_more_attempts_are_in_flight_than_there_are_permits() -> None:
    async def slowly(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.01)
        return await CAPTION(request)

    async with ScriptedServer(slowly) as server, server.session(permits=5) as session:
        await asyncio.gather(*(session.analyze(r) for r in requests_of(40, Captioning)))
        assert (session.stats.calls, busy(session.stats)) == (40, (0, 0, 0))
    assert server.most_in_flight == 5


@pytest.mark.parametrize("permits", [1, 5])
async def test_status_polls_have_separate_permits(permits: int) -> None:
    status = answer(content={"data": {"task_id": "t", "status": "pending"}})

    async def slowly(request: web.Request) -> web.StreamResponse:
        await asyncio.sleep(0.01)
        return await status(request)

    async with ScriptedServer(slowly) as server:
        async with server.session(permits=permits, poll_permits=3) as session:
            await asyncio.gather(*(session.task_status(f"t{number}") for number in range(20)))
    assert server.most_in_flight == 3


async def test_connections_are_kept_and_cookies_are_not() -> None:
    peers = set()

    async def note(request: web.Request) -> web.StreamResponse:
        assert request.transport is not None
        peers.add(request.transport.get_extra_info("peername"))
        return await answer(sample="captioning", headers={"Set-Cookie": "a=b"})(request)

    async with ScriptedServer(note) as server, server.session() as session:
        for _ in range(5):
            await session.analyze(Captioning(URL))
    assert len(peers) == 1
    assert not any("Cookie" in seen.headers for seen in server.seen)


async def test_map_and_analyze_all_over_the_socket() -> None:
    async def some_fail(request: web.Request) -> web.StreamResponse:
        number = (await request.json())["source"]["uri"].rpartition("/")[2]
        return await (answer(404) if number == "3.jpg" else CAPTION)(request)

    async with ScriptedServer(some_fail) as server, server.session() as session:
        uris = [f"https://example.com/{number}.jpg" for number in range(8)]
        found = [o async for o in session.map(uris, Captioning, ordered=True)]
        assert [o.item for o in found] == uris
        assert [o.error is None for o in found] == [n != 3 for n in range(8)]
        outcomes = await session.analyze_all([Captioning(uri) for uri in uris])
        assert [o.request for o in outcomes] == [Captioning(uri) for uri in uris]
        assert [o.error is None for o in outcomes] == [n != 3 for n in range(8)]


async def test_map_over_different_models_gives_each_its_type() -> None:
    async def by_model(request: web.Request) -> web.StreamResponse:
        return await answer(sample=request.path.rpartition("/")[2])(request)

    requests: list[Any] = [Captioning(URL), Coco(URL), GoogleLogoDetection(URL)]
    async with ScriptedServer(by_model) as server, server.session() as session:
        outcomes = await session.analyze_all(requests)
    assert [type(o.unwrap().analysis) for o in outcomes] == [r.analysis_type for r in requests]


async def test_analyze_all_has_all_outcomes_of_a_stopped_stream() -> None:
    async with ScriptedServer(answer(401, sample="error_401")) as server:
        async with server.session(permits=2) as session:
            outcomes = await session.analyze_all(requests_of(30, Captioning))
            assert [outcome.index for outcome in outcomes] == list(range(30))
            assert all(outcome.response is None for outcome in outcomes)
            assert isinstance(outcomes[-1].error, BulkStoppedError)
            assert len(server.seen) < 10
            assert session.stats.calls == len(server.seen)


async def test_a_call_timeout_of_an_item_is_its_outcome_and_stops_nothing(
    clock: ManualClock,
) -> None:
    async def sometimes_silent(request: web.Request) -> web.StreamResponse:
        if b"/3.jpg" in await request.read():
            await asyncio.sleep(30)
        return await CAPTION(request)

    async with ScriptedServer(sometimes_silent) as server:
        async with server.session(clock=clock, call_timeout=3) as session:
            calls = asyncio.create_task(session.analyze_all(requests_of(8, Captioning)))
            await until(lambda: len(server.seen) == 8 and session.stats.in_flight == 1)
            await clock.advance(3)
            outcomes = await calls
    failed = [outcome for outcome in outcomes if outcome.error is not None]
    assert [outcome.index for outcome in failed] == [3]
    assert isinstance(failed[0].error, TimeoutError)


async def test_an_expired_call_is_not_sent() -> None:
    """On a warm connection the request would be written, and charged, before the first yield."""
    async with ScriptedServer(CAPTION) as server, server.session() as session:
        await session.analyze(Captioning(URL))
        for timeout in (0, -1.5):
            with pytest.raises(CallTimeoutError, match="before it was sent") as caught:
                await session.analyze(Captioning(URL), timeout=timeout)
            assert (caught.value.attempts, caught.value.ambiguous) == (0, False)
            with pytest.raises(TaskTimeoutError, match="before it was sent"):
                await session.submit(Captioning(URL), timeout=timeout)
        await session.analyze(Captioning(URL))
    assert len(server.seen) == 2


@pytest.mark.parametrize(
    ("misuse", "kind", "sentence"),
    [
        (lambda session: session.submit(URL), InvalidRequestError, "is not a request"),
        (lambda session: session.submit(Captioning), InvalidRequestError, "is not a request"),
        (lambda session: session.task("t1", "coco"), InvalidRequestError, "is not a request"),
        (lambda session: session.task("", Coco), InvalidRequestError, "task id"),
        (lambda session: session.map([URL], Captioning, mode="x"), ConfigurationError, "mode"),
        (
            lambda session: session.submit(Captioning(URL), timeout="5"),
            ConfigurationError,
            "seconds",
        ),
        (
            lambda session: session.task("t1", Coco, timeout=math.nan),
            ConfigurationError,
            "seconds",
        ),
    ],
)
async def test_a_misuse_is_reported_where_it_is_made(
    misuse: Callable[[Any], object], kind: type[Exception], sentence: str
) -> None:
    async with ScriptedServer(CAPTION) as server, server.session() as session:
        with pytest.raises(kind, match=sentence):
            misuse(session)
        with pytest.raises(InvalidRequestError, match="is not a request"):
            await session.analyze(URL)
    assert not server.seen


@pytest.mark.parametrize(
    "options",
    [
        {"credentials": "cloudinary://1:2@demo"},
        {"settings": {"permits": 2}},
        {"notifications": object()},
        {"notification_url": "hooks.example.com/cloudinary"},
        {"notification_url": "poll://results"},
        {"notification_url": "http\u017f://hooks.example.com/cloudinary"},  # a long s
        {"on_event": "print"},
    ],
)
def test_a_session_refuses_what_it_cannot_use(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        AnalyzeSession(**{"credentials": Credentials("demo", KEY, SECRET), **options})


async def test_the_emulator_answers_every_model_to_the_session() -> None:
    async with Emulator() as emulator:
        async with AnalyzeSession(Credentials.from_url(emulator.cloudinary_url)) as session:
            for model, kind in MODELS.items():
                request = kind(emulator.sample_url(1), **PARAMETERS.get(model, {}))
                response = await session.analyze(request)
                assert type(response.analysis) is kind.analysis_type
                assert response.entity == emulator.sample_url(1)
                (limit,) = response.limits
                assert limit.type == kind.feature
            tagged = AIVisionTagging(
                emulator.sample_url(1), tag_definitions={"cat": "Is there a cat?"}
            )
            assert set((await session.analyze(tagged)).analysis.names) <= {"cat"}


async def test_the_default_body_is_what_the_service_expects_byte_for_byte() -> None:
    async with ScriptedServer(CAPTION) as server, server.session() as session:
        await session.analyze(Captioning("https://example.com/ä b".replace(" ", "%20")))
    assert json.loads(server.seen[0].body) == {"source": {"uri": "https://example.com/ä%20b"}}
    assert "ä".encode() in server.seen[0].body


@pytest.mark.timeout(300)  # mypy without a cache
def test_mypy_infers_the_promised_types() -> None:
    """`tests/typing/session.py` holds the promises; mypy reads them."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "mypy", "--strict", "--no-error-summary"]
    done = subprocess.run(
        [*command, str(root / "tests" / "typing" / "session.py")],
        capture_output=True,
        text=True,
        cwd=root,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
