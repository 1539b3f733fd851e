"""A task that fails for its quota stops what a call's quota error stops."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from scripted import SECRET, URL, ScriptedServer, answer, until
from task_support import build_result, sign

from cloudinary_analyze import (
    AIVisionGeneral,
    AnalyzeSession,
    BulkStoppedError,
    Captioning,
    Delivery,
    OtherModel,
    QuotaExceededError,
    TaskFailedError,
)
from cloudinary_analyze.ledger.sqlite import SQLiteLedger
from cloudinary_analyze.testing import ManualClock

LIMITS = {"addons_quota": [{"type": "ai_vision", "remaining": 0, "limit": 500}]}
QUOTA_ERROR = {"category": "rate_limit_error", "code": "MA_00008", "message": "used up"}
VISION = AIVisionGeneral(URL, prompts=["What is shown?"])
RESULT = {"analysis": {"responses": [{"value": "a cat"}]}}


class Tasks:
    """Accepts every analysis as a task, and reports the status that the test sets."""

    def __init__(self) -> None:
        self.accepted = 0
        self.status: dict[str, Any] = {"data": {"status": "pending"}}

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        if request.method == "GET":
            return await answer(content=self.status)(request)
        self.accepted += 1
        data = {"task_id": f"t{self.accepted}", "status": "pending"}
        return await answer(202, {"data": data})(request)


def build_quota_failure(task_id: str, **fields: Any) -> bytes:
    content = {"http_status": 429, "error": QUOTA_ERROR, "limits": LIMITS, "data": None, **fields}
    return build_result(task_id, **content)


def notify(queue: asyncio.Queue[Delivery], body: bytes) -> None:
    queue.put_nowait(sign(body, secret=SECRET, received_at=None))


async def check_stopped(session: AnalyzeSession, tasks: Tasks) -> None:
    """The feature's later calls and tasks fail unsent; those of other features do not."""
    sent = tasks.accepted
    assert session.quota["ai_vision"].remaining == 0
    with pytest.raises(QuotaExceededError, match="Not sent") as caught:
        await session.analyze(VISION)
    assert (caught.value.attempts, caught.value.task_id) == (0, None)
    with pytest.raises(QuotaExceededError, match="Not sent"):
        await session.submit(VISION)
    assert tasks.accepted == sent
    await session.submit(Captioning(URL), mode="task").accepted()
    assert tasks.accepted == sent + 1


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"http_status": None},
        {"error": {**QUOTA_ERROR, "code": "MA_00429"}},
        {"limits": None, "data": {"limits": LIMITS}},
    ],
)
async def test_a_webhook_trips_the_breaker_of_its_feature(fields: dict[str, Any]) -> None:
    tasks, queue = Tasks(), asyncio.Queue[Delivery]()
    async with ScriptedServer(tasks) as server, server.session(notifications=queue) as session:
        task = session.submit(VISION)
        assert await task.accepted() == "t1"
        notify(queue, build_quota_failure("t1", **fields))
        with pytest.raises(QuotaExceededError) as caught:
            await task
        assert (caught.value.task_id, caught.value.feature) == ("t1", "ai_vision")
        await check_stopped(session, tasks)


@pytest.mark.parametrize("with_source", [True, False])
@pytest.mark.filterwarnings("ignore:A task was submitted on a session without:UserWarning")
async def test_a_status_with_the_reason_trips_it_too(with_source: bool) -> None:
    tasks = Tasks()
    tasks.status = {"data": {"status": "failed"}, "error": QUOTA_ERROR, "limits": LIMITS}
    source = asyncio.Queue[Delivery]() if with_source else None
    async with ScriptedServer(tasks) as server:
        async with server.session(notifications=source, poll_first=0.01) as session:
            task = session.submit(VISION, mode="task")
            with pytest.raises(QuotaExceededError) as caught:
                await task
            assert (caught.value.task_id, caught.value.code) == ("t1", "MA_00008")
            assert json.loads(caught.value.raw_body) == tasks.status
            with pytest.raises(QuotaExceededError):
                await session.task("t1", VISION)
            await check_stopped(session, tasks)


async def test_a_status_with_another_reason_stops_nothing() -> None:
    tasks = Tasks()
    error = {"category": "user_error", "code": "MA_00003", "message": "it is not an image"}
    tasks.status = {"data": {"status": "failed", "error": error}}
    async with ScriptedServer(tasks) as server:
        async with server.session(notifications=asyncio.Queue(), poll_first=0.01) as session:
            with pytest.raises(TaskFailedError, match="it is not an image") as caught:
                await session.submit(VISION)
            assert caught.value.cause_known
            await session.submit(VISION).accepted()


@pytest.mark.parametrize("request_type", [AIVisionGeneral, VISION])
async def test_a_task_attached_by_its_id_trips_it(request_type: Any) -> None:
    tasks, queue = Tasks(), asyncio.Queue[Delivery]()
    async with ScriptedServer(tasks) as server, server.session(notifications=queue) as session:
        task = session.task("elsewhere", request_type)
        notify(queue, build_quota_failure("elsewhere"))
        with pytest.raises(QuotaExceededError):
            await task
        await check_stopped(session, tasks)


@pytest.mark.filterwarnings("ignore:A task was submitted on a session without:UserWarning")
async def test_an_item_whose_repeat_lacked_quota_is_sent_again(tmp_path: Path) -> None:
    """Also by the session that knows the task and the error of its repetition."""
    tasks, repeats = Tasks(), 0
    tasks.status = {"data": {"status": "completed"}}
    renewed = {**LIMITS["addons_quota"][0], "reset_time": "2020-01-01T00:00:00Z"}

    async def handle(request: web.Request) -> web.StreamResponse:
        nonlocal repeats
        if request.method == "GET" or "async" in await request.json():
            return await tasks(request)
        repeats += 1
        if repeats == 1:
            refusal = {"error": QUOTA_ERROR, "limits": {"addons_quota": [renewed]}}
            return await answer(429, refusal)(request)
        return await answer(content={"data": RESULT})(request)

    async with (
        ScriptedServer(handle) as server,
        SQLiteLedger(tmp_path / "ledger.sqlite") as ledger,
        server.session(poll_first=0.01, on_missing_result="analyze") as session,
    ):
        stream = session.map([VISION], mode="task", ledger=ledger)
        assert isinstance((await anext(stream)).error, QuotaExceededError)
        with pytest.raises(BulkStoppedError):
            await anext(stream)
        async with session.map([VISION], mode="task", ledger=ledger) as stream:
            assert (await anext(stream)).unwrap().analysis.responses
        assert (tasks.accepted, repeats) == (2, 2)


async def test_a_task_whose_handle_was_dropped_trips_it() -> None:
    tasks, queue = Tasks(), asyncio.Queue[Delivery]()
    async with ScriptedServer(tasks) as server, server.session(notifications=queue) as session:
        task = session.submit(VISION)
        await task.accepted()
        task.abandon()
        del task
        notify(queue, build_quota_failure("t1"))
        await until(lambda: session.stats.notifications.get("resolved"))
        await check_stopped(session, tasks)


async def test_a_model_without_a_feature_trips_itself_alone() -> None:
    tasks, queue = Tasks(), asyncio.Queue[Delivery]()
    async with ScriptedServer(tasks) as server, server.session(notifications=queue) as session:
        other = OtherModel("new_model", URL)
        task = session.submit(other)
        await task.accepted()
        notify(queue, build_quota_failure("t1"))
        with pytest.raises(QuotaExceededError):
            await task
        with pytest.raises(QuotaExceededError, match="Not sent"):
            await session.analyze(other)
        await session.submit(VISION).accepted()


async def test_a_probing_task_opens_it_by_its_result(clock: ManualClock) -> None:
    """Its acceptance shows nothing, because earlier tasks were accepted and failed."""
    tasks, queue = Tasks(), asyncio.Queue[Delivery]()
    async with ScriptedServer(tasks) as server:
        async with server.session(notifications=queue, clock=clock) as session:
            failing = session.submit(VISION)
            await failing.accepted()
            notify(queue, build_quota_failure("t1"))
            with pytest.raises(QuotaExceededError):
                await failing
            await clock.advance(301)
            probe = session.submit(VISION)
            assert await probe.accepted() == "t2"
            with pytest.raises(QuotaExceededError, match="Not sent"):
                await session.submit(VISION)
            notify(queue, build_result("t2", data=RESULT))
            await probe
            assert await session.submit(VISION).accepted() == "t3"
