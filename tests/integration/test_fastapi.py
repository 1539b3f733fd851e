"""The FastAPI application that the documentation prints, in one process and in two."""

import asyncio
import contextlib
import importlib.util
import time
from pathlib import Path

import aiohttp
import pytest
from notification_support import (
    build_answer,
    serve_asgi,
    sign,
    until,
)
from ports import reserve_port

from cloudinary_analyze.emulator import Emulator

PROGRAM = Path(__file__).parent.parent / "apps" / "fastapi_app.py"


@pytest.fixture
def open_worker(shared_redis, monkeypatch):
    """Run the printed program as one more worker; yields its module and its origin."""

    @contextlib.asynccontextmanager
    async def open_worker(emulator):
        port = reserve_port()
        monkeypatch.setenv("CLOUDINARY_URL", emulator.cloudinary_url)
        monkeypatch.setenv("REDIS_URL", shared_redis.url)
        monkeypatch.setenv("PUBLIC_URL", f"http://127.0.0.1:{port}")
        spec = importlib.util.spec_from_file_location("fastapi_app", PROGRAM)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        async with serve_asgi(module.app, port=port) as origin:
            yield module, origin

    return open_worker


async def get(client, url, **query):
    async with client.get(url, params=query) as response:
        return response.status, await response.json()


async def deliver(client, origin, task_id, caption):
    body = build_answer(task_id, caption)
    headers = sign(body, at=time.time())
    async with client.post(f"{origin}/hooks/cloudinary", data=body, headers=headers) as response:
        assert response.status == 200


async def test_a_handler_awaits_its_own_result(open_worker):
    async with (
        Emulator(task_seconds=0.02) as emulator,
        open_worker(emulator) as (_, origin),
        aiohttp.ClientSession() as client,
    ):
        uris = emulator.sample_urls(20)
        answers = await asyncio.gather(*(get(client, f"{origin}/captions", uri=u) for u in uris))
        assert [status for status, _ in answers] == [200] * 20
        assert [content["uri"] for _, content in answers] == uris


async def test_any_worker_re_attaches_by_the_id_of_a_504(open_worker):
    async with (
        Emulator(task_seconds=3600) as emulator,
        open_worker(emulator) as (module, origin),
        open_worker(emulator) as (_, other),
        aiohttp.ClientSession() as client,
    ):
        module.PATIENCE = 1.5  # for the service to accept the task
        status, content = await get(client, f"{origin}/captions", uri="https://x.test/a.jpg")
        task_id = content["detail"]["task_id"]
        assert (status, task_id in emulator.tasks) == (504, True)
        assert (await get(client, f"{origin}/captions/{task_id}"))[0] == 504
        module.PATIENCE = 30.0
        await deliver(client, other, task_id, "Late")
        for worker in (origin, other):
            status, content = await get(client, f"{worker}/captions/{task_id}")
            assert (status, content["caption"]) == (200, "Late")


async def test_an_id_that_the_service_does_not_know_is_a_404(open_worker):
    async with (
        Emulator(task_seconds=3600) as emulator,
        open_worker(emulator) as (module, origin),
        aiohttp.ClientSession() as client,
    ):
        module.PATIENCE = 3.0
        status, content = await get(client, f"{origin}/captions/nosuchtask")
        assert (status, content["detail"]) == (404, {"task_id": "nosuchtask"})


async def test_a_flood_of_unknown_ids_is_bounded_and_delays_no_caption(open_worker, monkeypatch):
    """Strangers ask for 300 made-up ids at once; 50 wait, the rest get a 503."""
    monkeypatch.setattr("cloudinary_analyze._tasks.table.MOST_UNCONFIRMED", 50)
    async with (
        Emulator(task_seconds=0.2) as emulator,
        open_worker(emulator) as (module, origin),
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as client,
    ):
        module.PATIENCE = 30.0
        flood = [
            asyncio.create_task(get(client, f"{origin}/captions/made-up-{number}"))
            for number in range(300)
        ]
        await until(lambda: sum(task.done() for task in flood) >= 250)
        assert {task.result()[0] for task in flood if task.done()} == {503}
        (uri,) = emulator.sample_urls(1)
        async with asyncio.timeout(30):
            status, content = await get(client, f"{origin}/captions", uri=uri)
        assert (status, content["uri"]) == (200, uri)
        assert sum(not task.done() for task in flood) == 50
        for task in flood:
            task.cancel()
        await asyncio.gather(*flood, return_exceptions=True)


async def test_one_unknown_id_too_many_is_a_503(open_worker, monkeypatch):
    monkeypatch.setattr("cloudinary_analyze._tasks.table.MOST_UNCONFIRMED", 0)
    async with (
        Emulator(task_seconds=3600) as emulator,
        open_worker(emulator) as (_, origin),
        aiohttp.ClientSession() as client,
    ):
        status, content = await get(client, f"{origin}/captions/nosuchtask")
        assert (status, content["detail"]) == (503, {"task_id": "nosuchtask"})


async def test_a_disconnected_client_ends_its_wait(open_worker, caplog):
    async with (
        Emulator(task_seconds=3600) as emulator,
        open_worker(emulator) as (module, origin),
        aiohttp.ClientSession() as client,
    ):
        asking = asyncio.create_task(get(client, f"{origin}/captions", uri="https://x.test/a.jpg"))
        table = module.app.state.session._connection.tracker.table
        await until(lambda: table.pending)
        (entry,) = table.pending.values()
        assert entry.waits
        asking.cancel()
        await until(lambda: not entry.waits)
        status, _ = await get(client, f"{origin}/openapi.json")
        assert status == 200
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
