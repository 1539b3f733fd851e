"""The webhook simulator, against applications in process and behind a socket."""

from __future__ import annotations

import asyncio
import pickle
import time
import warnings
from contextlib import asynccontextmanager

import httpx
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient as AiohttpClient
from aiohttp.test_utils import TestServer
from fastapi import FastAPI, HTTPException, Request
from notification_support import serve_asgi, until
from starlette.routing import Route

from cloudinary_analyze import (
    AnalyzeSession,
    Captioning,
    Coco,
    ConfigurationError,
    Credentials,
    TaskFailedError,
)
from cloudinary_analyze.emulator import FaultPlan, WebhookPolicy
from cloudinary_analyze.notifications.aiohttp import WebhookReceiver as AiohttpReceiver
from cloudinary_analyze.notifications.asgi import WebhookReceiver
from cloudinary_analyze.testing import (
    ScriptedEmulator,
    WebhookReply,
    WebhookSimulator,
    build_notification,
    run_emulator,
    sign_notification,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # starlette prefers another version of httpx
    from fastapi.testclient import TestClient

URL = "https://images.example/bee.jpg"
HOOK = "/hooks/cloudinary"
BEE = {"data": {"caption": "A bee"}}


def build_app(emulator, *, attach=True):
    """Return an application that submits a task and awaits its webhook."""

    @asynccontextmanager
    async def lifespan(app):
        queue = asyncio.Queue()
        credentials = emulator.credentials
        if attach:
            app.routes.append(Route(HOOK, endpoint=WebhookReceiver(queue, credentials)))
        async with AnalyzeSession(
            credentials, notifications=queue, notification_url="https://app.example/hooks"
        ) as app.state.session:
            yield

    app = FastAPI(lifespan=lifespan)

    @app.get("/captions")
    async def caption(uri: str, request: Request):
        task = request.app.state.session.submit(Captioning(uri), timeout=20)
        try:
            return {"caption": (await task).analysis.caption}
        except TaskFailedError as error:
            raise HTTPException(502, error.message) from error

    return app


@pytest.fixture
def emulator():
    with run_emulator(ScriptedEmulator(task_seconds=0.01)) as emulator:
        yield emulator


@pytest.fixture
async def app(emulator):
    app = build_app(emulator)
    async with app.router.lifespan_context(app):
        yield app


def open_client(app):
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://app.example")


def test_a_test_client_gets_the_emulators_webhooks(emulator):
    emulator.respond(Captioning, BEE)
    with TestClient(build_app(emulator)) as client:
        simulator = WebhookSimulator(client, HOOK, credentials=emulator.credentials)
        simulator.connect(emulator)
        assert client.get("/captions", params={"uri": URL}).json() == {"caption": "A bee"}
        asyncio.run(until(lambda: [task.notified for task in emulator.tasks.values()] == [True]))
    assert simulator.replies == [WebhookReply(200, "Stored.")]
    assert emulator.requests == [Captioning(URL)]


def test_a_synchronous_test_posts_its_own(emulator):
    with TestClient(build_app(emulator)) as client:
        body = build_notification("t1", Captioning, BEE)
        headers = sign_notification(body, emulator.credentials)
        assert client.post(HOOK, content=body, headers=headers).status_code == 200
        forged = sign_notification(body, Credentials("demo", "1", "guessed"))
        assert client.post(HOOK, content=body, headers=forged).status_code == 401
        simulator = WebhookSimulator(client, HOOK, credentials=emulator.credentials)
        assert asyncio.run(simulator.post(body)).status == 200
        assert asyncio.run(simulator.post(body, at=time.time() - 86_400)).status == 401


@pytest.mark.parametrize("by_client", [False, True], ids=["application", "async client"])
async def test_an_application_in_process_gets_them_on_its_loop(emulator, app, by_client):
    emulator.respond(Captioning(URL), BEE)
    emulator.respond(Captioning, status=415)
    async with open_client(app) as client:
        target = client if by_client else app
        WebhookSimulator(target, HOOK, credentials=emulator.credentials).connect(emulator)
        captions = [client.get("/captions", params={"uri": uri}) for uri in (URL, f"{URL}?2")]
        found, failed = await asyncio.gather(*captions)
    assert found.json() == {"caption": "A bee"}
    assert failed.status_code == 502
    assert "unsupported media type" in failed.text.lower()


def test_leaving_a_test_client_meanwhile_is_not_an_error(emulator, caplog):
    class LeavingClient:
        portal = object()

        def post(self, path, *, content, headers):
            self.portal = None
            raise RuntimeError("This portal is not running")

    simulator = WebhookSimulator(LeavingClient(), HOOK, credentials=emulator.credentials)
    simulator.connect(emulator)

    async def act():
        async with AnalyzeSession(emulator.credentials, notifications=asyncio.Queue()) as session:
            await submit(session)
            await until(lambda: emulator.counts.webhooks_refused)

    asyncio.run(act())
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
    with pytest.raises(RuntimeError, match="portal"):
        asyncio.run(simulator.post(b"{}"))


async def submit(session):
    await session.submit(Coco(URL)).accepted()


async def test_a_server_gets_them_by_its_origin(emulator):
    app = build_app(emulator)
    async with serve_asgi(app) as origin, httpx.AsyncClient(base_url=origin) as client:
        simulator = WebhookSimulator(f"{origin}/", HOOK, credentials=emulator.credentials)
        simulator.connect(emulator)
        response = await client.get("/captions", params={"uri": URL}, timeout=60)
        assert response.status_code == 200
        assert (await simulator.post(b"{")).status == 400


@pytest.mark.parametrize("kind", ["server", "client", "url"])
async def test_aiohttp_applications_get_them_by_their_test_tools(emulator, kind):
    queue = asyncio.Queue()
    app = web.Application()
    app.router.add_post(HOOK, AiohttpReceiver(queue, emulator.credentials).handle)
    async with TestServer(app) as server, AiohttpClient(server) as client:
        targets = {"server": server, "client": client, "url": server.make_url("/")}
        simulator = WebhookSimulator(targets[kind], HOOK, credentials=emulator.credentials)
        simulator.connect(emulator)
        async with AnalyzeSession(emulator.credentials, notifications=queue) as session:
            assert (await session.submit(Coco(URL), timeout=20)).entity == URL


async def test_a_notification_built_by_the_test_ends_its_task(emulator, app):
    emulator.task_seconds = 3600
    simulator = WebhookSimulator(app, HOOK, credentials=emulator.credentials)
    task = app.state.session.submit(Coco(URL))
    task_id = await task.accepted()
    await simulator.post(build_notification(task_id, Coco, status=404, message="no such image"))
    with pytest.raises(TaskFailedError, match="no such image") as caught:
        await task
    assert caught.value.status == 404
    assert simulator.replies[0].status == 200


async def test_a_refused_notification_is_repeated():
    replies = [503, 500, 200]
    bodies = []

    async def application(scope, receive, send):
        bodies.append((await receive())["body"])
        await send({"type": "http.response.start", "status": replies.pop(0), "headers": []})
        await send({"type": "http.response.body", "body": b"x", "more_body": True})
        await send({"type": "http.response.body"})
        assert (await receive())["type"] == "http.disconnect"

    policy = WebhookPolicy(retry_scale=0.00001)
    async with ScriptedEmulator(task_seconds=0, webhooks=policy) as emulator:
        simulator = WebhookSimulator(application, "/", credentials=emulator.credentials)
        simulator.connect(emulator)
        async with AnalyzeSession(emulator.credentials) as session:
            with pytest.warns(UserWarning, match="notification"):
                session.submit(Coco(URL), mode="task").abandon()
            await until(lambda: not replies)
            await until(lambda: [task.notified for task in emulator.tasks.values()] == [True])
    assert [reply.status for reply in simulator.replies] == [503, 500, 200]
    assert len(bodies) == 3


async def test_fault_plans_apply_to_the_deliveries(emulator, app):
    emulator.faults = FaultPlan(forged=1, stale=1, malformed=1, foreign=1, duplicated=1, early=1)
    simulator = WebhookSimulator(app, HOOK, credentials=emulator.credentials)
    simulator.connect(emulator)
    await app.state.session.submit(Coco(URL))
    await until(lambda: len(simulator.replies) == 6)
    assert [reply.status for reply in simulator.replies] == [401, 401, 400, 200, 200, 200]


async def test_an_application_that_raises_is_reported(emulator, app, caplog):
    async def application(scope, receive, send):
        raise ZeroDivisionError

    simulator = WebhookSimulator(application, "/", credentials=emulator.credentials)
    with pytest.raises(ZeroDivisionError):
        await simulator.post(b"{}")
    simulator.connect(emulator)
    app.state.session.submit(Coco(URL)).abandon()
    await until(lambda: emulator.counts.webhooks_refused)
    assert "ZeroDivisionError" in caplog.text
    assert simulator.replies == []


async def test_an_unreachable_server_gets_the_notification_again(emulator, caplog):
    simulator = WebhookSimulator("http://127.0.0.1:1", HOOK, credentials=emulator.credentials)
    simulator.connect(emulator)
    async with AnalyzeSession(emulator.credentials, notifications=asyncio.Queue()) as session:
        await submit(session)
        await until(lambda: emulator.counts.webhooks_refused)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_a_closed_loop_does_not_stop_the_emulator(emulator, caplog):
    async def build():
        return WebhookSimulator(FastAPI(), HOOK, credentials=emulator.credentials)

    simulator = asyncio.run(build())
    simulator.connect(emulator)

    async def act():
        async with AnalyzeSession(emulator.credentials, notifications=asyncio.Queue()) as session:
            await submit(session)
            await until(lambda: emulator.counts.webhooks_refused)
        with pytest.raises(ConnectionRefusedError, match="closed"):
            await simulator.post(b"{}")

    asyncio.run(act())
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_targets_that_cannot_work_are_refused(emulator, monkeypatch):
    credentials = emulator.credentials
    for target in (7, "app:app", FastAPI, None):
        with pytest.raises(ConfigurationError, match="must be an ASGI application"):
            WebhookSimulator(target, HOOK, credentials=credentials)
    with pytest.raises(ConfigurationError, match="path"):
        WebhookSimulator("http://127.0.0.1:1", "hooks", credentials=credentials)
    for target in (FastAPI(), open_client(FastAPI())):
        with pytest.raises(ConfigurationError, match="on its event loop"):
            WebhookSimulator(target, HOOK, credentials=credentials)
    with pytest.raises(ConfigurationError, match="Missing credentials"):
        WebhookSimulator("http://127.0.0.1:1", HOOK)
    monkeypatch.setenv("CLOUDINARY_URL", emulator.cloudinary_url)
    simulator = WebhookSimulator("http://127.0.0.1:1", HOOK)
    with pytest.raises(TypeError, match="cannot be pickled"):
        pickle.dumps(simulator)
    assert emulator.api_secret not in repr(simulator)
