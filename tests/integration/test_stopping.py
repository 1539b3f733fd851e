"""A stream that is stopped or closed sends nothing more: no first attempt, and no retry."""

from __future__ import annotations

import asyncio
from collections import deque
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from scripted import (
    CAPTION,
    Handler,
    ScriptedServer,
    after,
    answer,
    busy,
    hang_up,
    requests_of,
    until,
)

from cloudinary_analyze import (
    AnalyzeError,
    Budget,
    BudgetReachedError,
    BulkStoppedError,
    Captioning,
    Credentials,
    RateLimitedError,
    ServerError,
    TransportError,
)
from cloudinary_analyze.ledger import SQLiteLedger
from cloudinary_analyze.testing import ManualClock

NEVER = 1000.0
PATIENCE = 30.0
ACCEPTED = answer(202, sample="accepted_202")


async def collect(stream: Any) -> list[Any]:
    async with asyncio.timeout(PATIENCE), stream:
        return [outcome async for outcome in stream]


def sort(outcomes: list[Any]) -> dict[str, int]:
    names = [type(outcome.error).__name__ for outcome in outcomes]
    return {name: names.count(name) for name in sorted(set(names))}


FAILURES: dict[str, tuple[Handler, type[AnalyzeError]]] = {
    "500": (answer(500), ServerError),
    "502": (answer(502, body=b"<html>"), ServerError),
    "503, asks for a wait": (answer(503, headers={"Retry-After": "50"}), ServerError),
    "429": (answer(429), RateLimitedError),
    "429, asks for a wait": (answer(429, headers={"Retry-After": "50"}), RateLimitedError),
    "no response": (hang_up(), TransportError),
}


@pytest.mark.parametrize("name", FAILURES)
async def test_a_call_that_waits_for_its_retry_is_not_sent(name: str) -> None:
    handler, kind = FAILURES[name]
    async with (
        ScriptedServer(handler) as server,
        server.session(permits=4, backoff_first=NEVER, backoff_max=NEVER) as session,
    ):
        stream = session.map(requests_of(100, Captioning), window=4)
        taking = asyncio.create_task(collect(stream))
        await until(lambda: server.seen and not server.in_flight)
        await until(lambda: session.stats.permits_in_use == 0)
        sent = len(server.seen)
        stream.stop()
        outcomes = await taking
        assert len(server.seen) == sent
        assert sort(outcomes)[kind.__name__] == sent
        assert sum(sort(outcomes).values()) == len(outcomes) <= 4
        assert session.stats.retries == session.stats.ambiguous_retries == 0
        assert busy(session.stats) == (0, 0, 0)


@pytest.mark.parametrize("name", FAILURES)
async def test_a_call_that_fails_later_is_not_repeated(name: str) -> None:
    handler, kind = FAILURES[name]
    go = asyncio.Event()
    async with ScriptedServer(after(go, handler)) as server, server.session(permits=2) as session:
        stream = session.map(requests_of(100, Captioning), window=6)
        taking = asyncio.create_task(collect(stream))
        await until(lambda: server.in_flight == 2 and session.stats.waiting == 4)
        stream.stop()
        await until(lambda: session.stats.waiting == 0)  # at once, not as permits come free
        go.set()
        outcomes = await taking
        assert len(server.seen) == 2
        assert sort(outcomes) == {kind.__name__: 2, "BulkStoppedError": 4}
        assert session.stats.retries == 0


async def test_an_answer_that_was_in_flight_is_handed_over() -> None:
    go = asyncio.Event()
    async with ScriptedServer(after(go)) as server, server.session(permits=2) as session:
        stream = session.map(requests_of(100, Captioning))
        taking = asyncio.create_task(collect(stream))
        await until(lambda: server.in_flight == 2)
        stream.stop()
        go.set()
        outcomes = await taking
        assert len(server.seen) == 2
        assert sum(outcome.error is None for outcome in outcomes) == 2


class SlowPacer:
    """Lets one attempt start, and then none."""

    def __init__(self) -> None:
        self.asked = 0

    async def acquire(self) -> None:
        self.asked += 1
        if self.asked > 1:
            await asyncio.sleep(NEVER)


@pytest.mark.parametrize("options", [{"rate": 0.01}, {"pacer": SlowPacer}])
async def test_items_that_wait_for_a_pace_end_at_once(options: dict[str, Any]) -> None:
    options = {name: each() if callable(each) else each for name, each in options.items()}
    async with ScriptedServer(CAPTION) as server, server.session(permits=3, **options) as session:
        stream = session.map(requests_of(100, Captioning))
        taking = asyncio.create_task(collect(stream))
        await until(lambda: server.seen and not server.in_flight)
        await asyncio.sleep(0.02)
        stream.stop()
        outcomes = await taking
        assert len(server.seen) == 1
        assert set(sort(outcomes)) == {"BulkStoppedError", "NoneType"}
        assert busy(session.stats) == (0, 0, 0)


async def test_other_calls_of_the_session_go_on() -> None:
    async with (
        ScriptedServer(answer(500)) as server,
        server.session(permits=4, attempts=50, backoff_first=0.05, backoff_max=0.05) as session,
    ):
        stream = session.map(requests_of(100, Captioning), window=2)
        taking = asyncio.create_task(collect(stream))
        other = asyncio.create_task(session.analyze(Captioning("https://example.com/other.jpg")))
        await until(lambda: len(server.seen) >= 3)
        stream.stop()
        await taking
        assert not other.done()
        server.handler = CAPTION
        async with asyncio.timeout(PATIENCE):
            assert (await other).analysis.caption


async def test_the_last_error_is_not_recorded_as_final(tmp_path: Path) -> None:
    async with (
        SQLiteLedger(tmp_path / "a.ledger") as ledger,
        ScriptedServer(answer(500)) as server,
        server.session(permits=4, backoff_first=NEVER, backoff_max=NEVER) as session,
    ):
        requests = requests_of(3, Captioning)
        stream = session.map(requests, ledger=ledger)
        taking = asyncio.create_task(collect(stream))
        await until(lambda: len(server.seen) == 3 and session.stats.permits_in_use == 0)
        stream.stop()
        assert sort(await taking) == {"ServerError": 3}
        server.handler = CAPTION
        again = await collect(session.map(requests, ledger=ledger))
        assert [outcome.restored for outcome in again] == [False] * 3
        assert sort(again) == {"NoneType": 3}


async def test_a_submission_is_not_repeated() -> None:
    async with (
        ScriptedServer(answer(500)) as server,
        server.session(
            notifications=asyncio.Queue(), backoff_first=NEVER, backoff_max=NEVER
        ) as session,
    ):
        stream = session.map(requests_of(3, Captioning), mode="task")
        taking = asyncio.create_task(collect(stream))
        await until(lambda: len(server.seen) == 3 and session.stats.permits_in_use == 0)
        stream.stop()
        assert sort(await taking) == {"ServerError": 3}
        assert len(server.seen) == 3


@pytest.mark.parametrize("close", [False, True])
async def test_an_undelivered_result_is_not_requested_again(close: bool) -> None:
    """`on_missing_result="analyze"` repeats a task as a call, which is charged again."""
    begun = asyncio.Event()

    async def handle(request: web.Request) -> web.StreamResponse:
        if request.method == "GET":
            return await answer(sample="task_status_completed")(request)
        if b'"async"' in await request.read():
            return await ACCEPTED(request)
        begun.set()
        return await answer(500)(request)

    async with (
        ScriptedServer(handle) as server,
        server.session(
            notifications=asyncio.Queue(),
            on_missing_result="analyze",
            result_grace=0.01,
            poll_first=0.01,
            backoff_first=NEVER,
            backoff_max=NEVER,
        ) as session,
    ):
        stream = session.map(requests_of(1, Captioning), mode="task")
        taking = asyncio.create_task(collect(stream))
        await begun.wait()
        await until(lambda: session.stats.permits_in_use == 0)
        sent = len(server.seen)
        if close:
            taking.cancel()
            await asyncio.wait({taking})
        else:
            stream.stop()
            assert sort(await taking) == {"ServerError": 1}
        await asyncio.sleep(0.05)
        assert [seen.method for seen in server.seen[sent:] if seen.method == "POST"] == []


async def test_a_task_whose_grace_ends_later_is_not_repeated() -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        if request.method == "GET":
            return await answer(sample="task_status_completed")(request)
        return await (ACCEPTED if b'"async"' in await request.read() else CAPTION)(request)

    async with (
        ScriptedServer(handle) as server,
        server.session(
            notifications=asyncio.Queue(),
            on_missing_result="analyze",
            result_grace=1,
            poll_first=0.01,
        ) as session,
    ):
        stream = session.map(requests_of(1, Captioning), mode="task")
        taking = asyncio.create_task(collect(stream))
        await until(lambda: len(server.seen) == 2)  # accepted, completed
        stream.stop()
        (stopped,) = await taking
        assert isinstance(stopped.error, BulkStoppedError)
        assert [seen.method for seen in server.seen].count("POST") == 1
        task_id = server.seen[1].path.rpartition("/")[2]
        async with asyncio.timeout(PATIENCE):  # another handle repeats it
            (request,) = requests_of(1, Captioning)
            assert (await session.task(task_id, request)).analysis.caption


async def test_closing_a_stream_repeats_no_submission(tmp_path: Path, clock: ManualClock) -> None:
    """What is in flight may still be accepted, and is recorded; a retry would be a new charge."""
    async with (
        SQLiteLedger(tmp_path / "a.ledger") as ledger,
        ScriptedServer(answer(500)) as server,
        server.session(
            notifications=asyncio.Queue(), clock=clock, backoff_first=1, backoff_max=1
        ) as session,
    ):
        stream = session.map(requests_of(3, Captioning), mode="task", ledger=ledger)
        taking = asyncio.create_task(collect(stream))
        await until(lambda: len(server.seen) == 3 and session.stats.permits_in_use == 0)
        taking.cancel()
        await asyncio.wait({taking})
        await clock.advance(10)
        await asyncio.sleep(0.05)
        assert len(server.seen) == 3


async def test_a_refused_token_is_not_renewed() -> None:
    go = asyncio.Event()
    fetched = []

    async def fetch() -> str:
        fetched.append(1)
        return f"token-{len(fetched)}"

    async with ScriptedServer(after(go, answer(401))) as server:
        credentials = Credentials("demo", oauth_token=fetch)
        async with server.session(credentials=credentials) as session:
            stream = session.map(requests_of(1, Captioning))
            taking = asyncio.create_task(collect(stream))
            await until(lambda: server.in_flight)
            stream.stop()
            go.set()
            with pytest.raises(BulkStoppedError):
                await taking
            assert len(server.seen) == len(fetched) == 1


async def test_a_cancellation_beside_the_stop_still_ends_the_consumer() -> None:
    async with (
        ScriptedServer(answer(500)) as server,
        server.session(backoff_first=NEVER, backoff_max=NEVER) as session,
    ):
        stream = session.map(requests_of(3, Captioning))
        taking = asyncio.create_task(collect(stream))
        await until(lambda: len(server.seen) == 3 and session.stats.permits_in_use == 0)
        stream.stop()
        taking.cancel()
        await asyncio.wait({taking})
        assert taking.cancelled()
        assert busy(session.stats) == (0, 0, 0)


async def test_a_stop_fails_no_shared_item_of_another(tmp_path: Path) -> None:
    go = asyncio.Event()

    async def fail_first(request: web.Request) -> web.StreamResponse:
        if go.is_set():
            return await CAPTION(request)
        await go.wait()
        return await answer(500)(request)

    async with (
        SQLiteLedger(tmp_path / "shared.ledger") as ledger,
        ScriptedServer(fail_first) as server,
        server.session() as session,
    ):
        stream = session.map(requests_of(1, Captioning), ledger=ledger)
        first = asyncio.create_task(collect(stream))
        await until(lambda: server.in_flight == 1)
        rest = deque(requests_of(1, Captioning))
        other = session.map((rest.popleft() for _ in range(1)), ledger=ledger)
        second = asyncio.create_task(collect(other))
        await until(lambda: not rest)
        stream.stop()
        go.set()
        assert sort(await first) == {"ServerError": 1}
        assert sort(await second) == {"NoneType": 1}


@pytest.mark.parametrize("budget", [Budget(calls=1), Budget(units={"object_detection": 1})])
@pytest.mark.parametrize("limit", [None, Budget(calls=100)])
async def test_a_budget_stops_only_its_own_stream(
    tmp_path: Path, budget: Budget, limit: Budget | None
) -> None:
    async with (
        SQLiteLedger(tmp_path / "shared.ledger") as ledger,
        ScriptedServer(CAPTION) as server,
        server.session() as session,
    ):
        requests = requests_of(10, Captioning)
        stream = session.map(requests, ledger=ledger, budget=budget)
        other = session.map(requests, ledger=ledger, budget=limit)
        first, second = await asyncio.gather(
            collect(stream), collect(other), return_exceptions=True
        )
        assert isinstance(first, BudgetReachedError)
        assert isinstance(second, list)
        assert sort(second) == {"NoneType": 10}
