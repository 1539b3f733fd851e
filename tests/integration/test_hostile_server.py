"""A hostile server makes neither memory nor logs grow without a bound."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging

import pytest
from aiohttp import web
from notification_support import CREDENTIALS
from scripted import SAMPLES, URL, ScriptedServer, answer

from cloudinary_analyze import AnalyzeError, Captioning, Delivery


async def test_the_number_of_remembered_limits_is_bounded() -> None:
    content = json.loads((SAMPLES / "captioning.json").read_bytes())
    numbers = itertools.count()

    async def handle(request: web.Request) -> web.StreamResponse:
        limits = [{"type": f"type-{next(numbers)}", "limit": 9, "remaining": 8} for _ in range(400)]
        return await answer(content=content | {"limits": {"items": limits}})(request)

    async with ScriptedServer(handle) as server, server.session() as session:
        for _ in range(5):
            response = await session.analyze(Captioning(URL))
            assert len(response.limits) == 400
            assert session.quota
        assert len(session.quota) == 1000


async def test_warnings_about_unknown_states_are_bounded(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    numbers = itertools.count()

    async def handle(request: web.Request) -> web.StreamResponse:
        state = f"state-{next(numbers)}-{'x' * 1000}"
        return await answer(content={"data": {"task_id": "t1", "status": state}})(request)

    inbox: asyncio.Queue[Delivery] = asyncio.Queue()
    async with ScriptedServer(handle) as server:
        async with server.session(
            credentials=CREDENTIALS,
            notifications=inbox,
            poll_first=0.0005,
            poll_longest=0.001,
            polls_per_second=1e5,
        ) as session:
            task = session.task("t1", Captioning, timeout=20)
            async with asyncio.timeout(30):
                while next(numbers) < 400:
                    await asyncio.sleep(0.01)
            task.abandon()
            with pytest.raises((AnalyzeError, asyncio.CancelledError)):
                await task
    lines = [record.getMessage() for record in caplog.records if "task state" in record.message]
    assert 50 < len(lines) <= 100
    assert max(map(len, lines)) < 200
