"""What a stream's budget counts of calls that end without a response, and of recorded tasks."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from aiohttp import web
from scripted import ScriptedServer, answer, hang_up, one_after_the_other, requests_of, until
from task_support import connected

from cloudinary_analyze import AnalyzeSession, Budget, Captioning, Spent
from cloudinary_analyze.ledger import SQLiteLedger

FEATURE = "object_detection"


async def collect(session: AnalyzeSession, count: int, **options: Any) -> tuple[list[Any], Spent]:
    async with session.map(requests_of(count, Captioning), **options) as stream:
        found = [outcome async for outcome in stream]
    assert stream.spent is not None
    return found, stream.spent


async def test_lost_responses_count_at_the_largest_cost() -> None:
    limits = {"addons_quota": [{"type": FEATURE, "used_by_request": 7}]}
    content = {"data": {"analysis": {"data": {"caption": "a cat"}}}, "limits": limits}
    handler = one_after_the_other(
        answer(content=content), hang_up(), answer(503), answer(500), answer(content=content)
    )
    async with ScriptedServer(handler) as server:
        async with server.session(attempts=1, retry_ambiguous=False) as session:
            budget = Budget(calls=5, units={FEATURE: 100})
            found, spent = await collect(session, 5, window=1, budget=budget)
    assert [outcome.error is None for outcome in found] == [True, False, False, False, True]
    assert (spent.calls, spent.units) == (4, {FEATURE: 28})  # the 503 is free


async def test_a_cancelled_call_in_flight_counts() -> None:
    async def hang(_: web.Request) -> web.StreamResponse:
        await asyncio.sleep(60)
        return web.Response()

    async with ScriptedServer(hang) as server, server.session() as session:
        async with session.map(requests_of(1, Captioning), budget=Budget(calls=5)) as stream:
            first = asyncio.ensure_future(anext(stream))
            await until(lambda: len(server.seen) == 1)
            first.cancel()
        assert stream.spent is not None
        assert stream.spent.calls == 1


async def test_a_recorded_task_is_not_paid_again(tmp_path: Path) -> None:
    (request,) = requests_of(1, Captioning)
    async with connected() as (emulator, session), SQLiteLedger(tmp_path / "x.ledger") as ledger:
        task = session.submit(request)
        task_id = await task.accepted()
        await ledger.open(base_url=emulator.url, cloud_name=emulator.cloud_name)
        await ledger.record_submitted(request.key, task_id)
        options: Any = {"mode": "task", "ledger": ledger, "budget": Budget(calls=0)}
        found, spent = await collect(session, 1, **options)
        assert (len(found), spent.calls) == (1, 0)
        assert found[0].error is None
        assert emulator.counts.total_done == 1
        await session.aclose()
