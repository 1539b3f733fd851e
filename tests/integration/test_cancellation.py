"""A call that is cancelled at any suspension leaves no trace, whatever its state."""

from __future__ import annotations

import asyncio

import pytest
from aiohttp import web
from scripted import (
    CAPTION,
    URL,
    Handler,
    ScriptedServer,
    Suspensions,
    answer,
    busy,
    hang_up,
    one_after_the_other,
    requests_of,
    step_through,
    until,
)

from cloudinary_analyze import Captioning

SLOW_DOWN = answer(429, headers={"Retry-After": "0.001"})


class Troubled:
    """Every other request fails, each time in a different way."""

    def __init__(self) -> None:
        self.count = 0
        self.failures: list[Handler] = [answer(500), SLOW_DOWN, hang_up(), answer(503)]

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        self.count += 1
        if self.count % 2:
            return await CAPTION(request)
        return await self.failures[self.count // 2 % 4](request)


@pytest.mark.parametrize("late", [False, True])
async def test_analyze_can_be_cancelled_everywhere(late: bool) -> None:
    async with ScriptedServer(CAPTION) as server, server.session() as session:
        assert await step_through(session, lambda: session.analyze(Captioning(URL)), late=late) > 2
        await session.analyze(Captioning(URL))


@pytest.mark.parametrize("late", [False, True])
async def test_analyze_can_be_cancelled_between_its_retries(late: bool) -> None:
    server = ScriptedServer(CAPTION)
    async with server, server.session(permits=2) as session:

        async def call() -> None:
            server.handler = CAPTION  # eight failures in a row would be an outage
            await session.analyze(Captioning(URL))
            server.handler = one_after_the_other(
                answer(500), SLOW_DOWN, hang_up(), answer(503), CAPTION
            )
            await session.analyze(Captioning(URL), timeout=30)

        assert await step_through(session, call, late=late) > 8
        assert session.stats.permits_allowed >= 1
        await session.analyze(Captioning(URL))


@pytest.mark.parametrize("late", [False, True])
async def test_analyze_can_be_cancelled_in_the_queue(late: bool) -> None:
    async with ScriptedServer(CAPTION) as server, server.session(permits=1) as session:

        async def call() -> None:
            await session.analyze(Captioning(URL))

        for number in range(1, 100):
            others = [asyncio.create_task(session.analyze(Captioning(URL))) for _ in range(3)]
            await asyncio.sleep(0)
            steps = Suspensions(number, late)
            task = asyncio.create_task(steps.drive(call()))
            await asyncio.wait([task, *others], timeout=30)
            assert all(other.exception() is None for other in others)
            assert busy(session.stats) == (0, 0, 0)
            if not task.cancelled() and steps.count < number:
                break
        else:
            raise AssertionError("it never completed")


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("ordered", [False, True])
async def test_map_can_be_cancelled_everywhere(ordered: bool, late: bool) -> None:
    async with ScriptedServer(Troubled()) as server:
        async with server.session(permits=2, attempts=10) as session:

            async def consume() -> None:
                seen = 0
                requests = requests_of(5, Captioning)
                async with session.map(requests, window=3, ordered=ordered) as stream:
                    async for outcome in stream:
                        outcome.unwrap()
                        seen += 1
                assert seen == 5

            assert await step_through(session, consume, late=late) > 3
            # the pump's tasks are gone too
            await until(lambda: len(asyncio.all_tasks()) <= 1 + server_tasks())


def server_tasks() -> int:
    names = ("RequestHandler", "aiohttp")
    return sum(any(n in repr(t.get_coro()) for n in names) for t in asyncio.all_tasks())


async def test_analyze_all_can_be_cancelled_everywhere() -> None:
    async with ScriptedServer(Troubled()) as server:
        async with server.session(permits=2, attempts=10) as session:

            async def run() -> None:
                outcomes = await session.analyze_all(requests_of(4, Captioning))
                assert [outcome.error for outcome in outcomes] == [None] * 4

            assert await step_through(session, run, late=False) > 2


@pytest.mark.parametrize("late", [False, True])
async def test_closing_can_be_cancelled_everywhere(late: bool) -> None:
    """However the close ends, nothing stays open (a leak would be a warning)."""
    for number in range(1, 60):
        async with ScriptedServer(Troubled()) as server:
            session = await server.session(permits=2).__aenter__()
            calls = [
                asyncio.create_task(session.analyze(request))
                for request in requests_of(6, Captioning)
            ]
            await asyncio.sleep(0.001)
            steps = Suspensions(number, late)
            closing = asyncio.create_task(steps.drive(session.aclose()))
            await asyncio.wait([closing], timeout=30)
            assert closing.done()
            await asyncio.wait(calls, timeout=30)
            assert all(call.done() for call in calls)
            for call in calls:
                assert not call.cancelled()
                call.exception()
            if not closing.cancelled() and steps.count < number:
                return
    raise AssertionError("it never completed")


async def test_cancelling_closes_the_connection_in_use() -> None:
    gone = asyncio.Event()
    arrived = asyncio.Event()

    async def hold(request: web.Request) -> web.StreamResponse:
        arrived.set()
        transport = request.transport
        assert transport is not None
        while not transport.is_closing():
            await asyncio.sleep(0.001)
        gone.set()
        return web.Response()

    async with ScriptedServer(hold) as server, server.session() as session:
        call = asyncio.create_task(session.analyze(Captioning(URL)))
        await arrived.wait()
        assert busy(session.stats) == (1, 1, 0)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert busy(session.stats) == (0, 0, 0)
        await asyncio.wait_for(gone.wait(), 30)
