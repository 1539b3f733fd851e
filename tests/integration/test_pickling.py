"""Values pickle and copy. Objects with credentials or a loop refuse both, and show no secret."""

import asyncio
import copy
import pickle
import traceback
from typing import Any

import attrs
import pytest
from scripted import CAPTION, KEY, SECRET, ScriptedServer

from cloudinary_analyze import (
    MODELS,
    AnalyzeError,
    AnalyzeSession,
    Captioning,
    Credentials,
    Delivery,
    Limit,
    Notification,
    OtherModel,
    Response,
    SessionStats,
    Settings,
    TagDefinition,
    TaskStatus,
    events,
)
from cloudinary_analyze.ledger.sqlite import SQLiteLedger
from cloudinary_analyze.notifications import QueueSource
from cloudinary_analyze.notifications.aiohttp import WebhookReceiver as AiohttpReceiver
from cloudinary_analyze.notifications.asgi import WebhookReceiver

URL = "https://images.example/a.jpg"
CREDENTIALS = Credentials("demo", KEY, SECRET)
PARAMETERS: dict[str, dict[str, Any]] = {
    "ai_vision_general": {"prompts": ["a"]},
    "ai_vision_moderation": {"rejection_questions": ["a"]},
    "ai_vision_tagging": {"tag_definitions": [TagDefinition("cat", "A cat?")]},
}


def check_refuses(value: object) -> None:
    ways = [
        *(lambda protocol=protocol: pickle.dumps(value, protocol) for protocol in range(6)),
        lambda: copy.copy(value),
        lambda: copy.deepcopy(value),
        lambda: pickle.dumps({"deep": [value]}),
        value.__reduce__,
        *(lambda protocol=protocol: value.__reduce_ex__(protocol) for protocol in range(6)),
    ]
    for way in ways:
        with pytest.raises(TypeError, match="cannot be pickled or copied") as caught:
            way()
        text = "".join(traceback.format_exception(caught.value))
        assert SECRET not in text
        assert "pLanted" not in text


async def test_sessions_tasks_and_streams_refuse(tmp_path: Any) -> None:
    async with ScriptedServer(CAPTION) as server:
        session = server.session()
        check_refuses(session)
        async with session:
            task = session.submit(Captioning(URL))
            stream = session.map([URL], Captioning)
            for value in (session, task, stream):
                check_refuses(value)
            await task
            assert [outcome.response is not None async for outcome in stream] == [True]
        for value in (session, task, stream):
            check_refuses(value)


async def test_receivers_sources_and_ledgers_refuse(tmp_path: Any) -> None:
    queue: asyncio.Queue[Delivery] = asyncio.Queue()
    check_refuses(QueueSource(queue))
    check_refuses(WebhookReceiver(queue, CREDENTIALS))
    check_refuses(AiohttpReceiver(queue, CREDENTIALS))
    ledger = SQLiteLedger(tmp_path / "ledger")
    check_refuses(ledger)
    async with ledger:
        check_refuses(ledger)


async def test_objects_with_credentials_refuse() -> None:
    """Serializers of task queues also follow `__reduce_ex__` of what a session is made of."""
    async with ScriptedServer(CAPTION) as server, server.session() as session:
        seen: set[int] = set()
        holders: list[object] = []

        def visit(value: object, depth: int) -> None:
            if id(value) in seen or depth > 6 or isinstance(value, type):
                return
            seen.add(id(value))
            names = {*getattr(value, "__dict__", ()), *getattr(type(value), "__slots__", ())}
            parts = [part for name in names if (part := getattr(value, name, None)) is not None]
            if any(part is session._credentials for part in parts):
                holders.append(value)
            for part in parts:
                if type(part).__module__.startswith("cloudinary_analyze"):
                    visit(part, depth + 1)

        visit(session, 0)
        assert len(holders) >= 1
        for holder in holders:
            check_refuses(holder)


def check_survives(value: Any) -> None:
    for protocol in range(2, 6):
        assert pickle.loads(pickle.dumps(value, protocol)) == value
    assert copy.copy(value) == value
    assert copy.deepcopy(value) == value
    assert attrs.evolve(value) == value


async def test_values_survive_pickling_and_copying() -> None:
    async with ScriptedServer(CAPTION) as server, server.session() as session:
        response = await session.analyze(Captioning(URL))
        stats = session.stats
        outcomes = await session.analyze_all([Captioning(URL)])
    assert stats.calls >= 1
    assert stats.notifications is not session.stats.notifications
    for value in (response, response.analysis, stats, *outcomes):
        check_survives(value)
    for value in (
        SessionStats(notifications={"resolved": 1}),
        Limit("ai_vision", remaining=3),
        TaskStatus("t1", "completed", raw={"data": {}}),
        Notification("t1", {"data": {"analysis": {}}}),
        Delivery(b"{}", {"a": "b"}),
        CREDENTIALS,
        Settings(permits=3, host="http://127.0.0.1:1"),
        OtherModel("new", URL, {"a": [1, {"b": 2**80}]}),
        *(kind(URL, **PARAMETERS.get(name, {})) for name, kind in MODELS.items()),
    ):
        check_survives(value)


@pytest.mark.parametrize("model", MODELS)
def test_every_response_survives(model: str, sample: Any) -> None:
    check_survives(Response.from_raw(MODELS[model], sample(model)))


def test_events_survive() -> None:
    kinds = [kind for kind in events.Event.__args__ if attrs.has(kind)]
    assert kinds
    for kind in kinds:
        fields = {field.name: 1 for field in attrs.fields(kind) if field.default is attrs.NOTHING}
        check_survives(kind(**fields))


def test_an_unopened_session_keeps_its_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUDINARY_URL", f"cloudinary://1:{SECRET.replace('/', '%2F')}@demo")
    check_refuses(AnalyzeSession())


@pytest.mark.parametrize(
    "sent",
    [b"", b"HTTP/1.1 200 OK\r\nContent-Type: text", b"HTTP/1.1 200", b"HTTP/1.1 200 OK\r\n\r\n{"],
)
async def test_the_causes_of_lost_connections_survive(sent: bytes) -> None:
    """Dask pickles the causes of errors, too."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(sent)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        host = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with AnalyzeSession(CREDENTIALS, settings=Settings(host=host, attempts=1)) as session:
            with pytest.raises(AnalyzeError) as caught:
                await session.analyze(Captioning(URL))
    assert caught.value.ambiguous
    assert "<" not in str(caught.value)
    link: BaseException | None = caught.value
    while link is not None:
        assert str(pickle.loads(pickle.dumps(link))) == str(link)
        link = link.__cause__
