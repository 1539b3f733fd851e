"""Cancelled at any suspension, tasks, streams, closes, receivers and Redis leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from notification_support import (
    CREDENTIALS,
    RedisServer,
    build_answer,
    build_delivery,
    sign,
)
from scripted import (
    SECRET,
    URL,
    Handler,
    ScriptedServer,
    Suspensions,
    answer,
    hang_up,
    requests_of,
    step_through,
    until,
)
from task_support import build_result, idle, library_tasks
from task_support import sign as sign_delivery

from cloudinary_analyze import AnalyzeError, AnalyzeSession, Captioning, Delivery
from cloudinary_analyze.ledger import SQLiteLedger
from cloudinary_analyze.notifications.aiohttp import WebhookReceiver as AiohttpReceiver
from cloudinary_analyze.notifications.asgi import WebhookReceiver as AsgiReceiver
from cloudinary_analyze.notifications.redis import RedisNotifications
from cloudinary_analyze.testing import ManualClock

both = pytest.mark.parametrize("late", [False, True])


class Tasks:
    """Accepts every request as a task and delivers its result; every third attempt fails first."""

    def __init__(self, *, troubled: bool = False) -> None:
        self.queue: asyncio.Queue[Delivery] = asyncio.Queue()
        self.count = 0
        self.attempts = 0
        self.troubled = troubled
        self.silent = False
        self.failures: list[Handler] = [
            answer(500),
            answer(429, headers={"Retry-After": "0.001"}),
            hang_up(),
        ]

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        if request.method == "GET":
            task_id = request.path.rpartition("/")[2]
            return await answer(content={"data": {"task_id": task_id, "status": "pending"}})(
                request
            )
        self.attempts += 1
        if self.troubled and self.attempts % 3 == 0:
            return await self.failures[self.attempts // 3 % 3](request)
        self.count += 1
        task_id = f"t{self.count}"
        if not self.silent:
            now = time.time()
            delivery = sign_delivery(build_result(task_id), secret=SECRET, at=now, received_at=now)
            self.queue.put_nowait(delivery)
        content = {"data": {"task_id": task_id, "status": "pending"}}
        return await answer(202, content=content)(request)


@contextlib.asynccontextmanager
async def serve(
    *, troubled: bool = False, **options: Any
) -> AsyncIterator[tuple[Tasks, AnalyzeSession]]:
    tasks = Tasks(troubled=troubled)
    async with ScriptedServer(tasks) as server:
        options = {"permits": 2, "attempts": 10, "task_timeout": 10.0, "poll_first": 60} | options
        async with server.session(notifications=tasks.queue, **options) as session:
            await session.submit(Captioning(URL))  # imports and connections
            yield tasks, session


def nothing_is_left(session: AnalyzeSession) -> Callable[[], bool]:
    """Return a check that permits, table and background tasks are as now."""
    before = len(library_tasks())
    return lambda: idle(session) == (0, 0, 0, 0) and len(library_tasks()) <= before


@both
@pytest.mark.parametrize("mode", ["task", "call"])
@pytest.mark.parametrize("troubled", [False, True])
async def test_a_submission_can_be_cancelled_everywhere(
    mode: Any, troubled: bool, late: bool
) -> None:
    """The submission continues to its end, because its handle was not cancelled."""
    handles = []
    async with serve(troubled=troubled) as (_, session):

        async def run() -> None:
            handles.append(session.submit(Captioning(URL), mode="task"))
            await handles[-1].accepted()
            await handles[-1].wait()
            handles.append(session.submit(Captioning(URL), mode=mode))
            await handles[-1]

        idle_again = nothing_is_left(session)
        assert await step_through(session, run, late=late, idle=idle_again) > 2
        await until(lambda: all(handle.done() for handle in handles))
        for handle in handles:
            with contextlib.suppress(AnalyzeError):
                handle.result()


@both
async def test_a_call_answered_by_a_task_can_be_cancelled_everywhere(late: bool) -> None:
    async with serve() as (_, session):

        async def run() -> None:
            await session.analyze(Captioning(URL))

        idle_again = nothing_is_left(session)
        assert await step_through(session, run, late=late, idle=idle_again) > 2
        await session.analyze(Captioning(URL))


@both
@pytest.mark.parametrize("mode", ["task", "call"])
@pytest.mark.parametrize("with_ledger", [False, True])
async def test_map_of_tasks_and_with_a_ledger_can_be_cancelled_everywhere(
    mode: Any, with_ledger: bool, late: bool, tmp_path: Path
) -> None:
    count = 0
    async with serve(troubled=True) as (_, session), contextlib.AsyncExitStack() as stack:
        ledgers = []

        async def run() -> None:
            nonlocal count
            count += 1
            ledger = SQLiteLedger(tmp_path / str(count)) if with_ledger else None
            if ledger is not None:
                ledgers.append(ledger)
                stack.push_async_callback(ledger.aclose)
            requests = requests_of(4, Captioning)
            seen = 0
            async with session.map(requests, mode=mode, window=3, ledger=ledger) as stream:
                async for outcome in stream:
                    outcome.unwrap()
                    seen += 1
            assert seen == 4

        idle_again = nothing_is_left(session)
        assert await step_through(session, run, late=late, idle=idle_again) > 3
        for ledger in ledgers:
            await ledger.aclose()


async def test_a_stream_closed_twice_withdraws_the_submission_in_flight(tmp_path: Path) -> None:
    """The first close waits for the 202, to record the task; the second does not."""
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    holding, release = asyncio.Event(), asyncio.Event()

    async def hold(request: web.Request) -> web.StreamResponse:
        holding.set()
        await release.wait()
        return await answer(400)(request)

    async with ScriptedServer(hold) as server, SQLiteLedger(tmp_path / "ledger") as ledger:
        async with server.session(notifications=asyncio.Queue()) as session:
            stream = session.map(requests_of(1, Captioning), mode="task", ledger=ledger)
            consumer = asyncio.ensure_future(anext(aiter(stream)))
            await holding.wait()
            closings = []
            for _ in range(2):
                closings.append(asyncio.create_task(stream.aclose()))
                for _ in range(5):
                    await asyncio.sleep(0)
            _, hanging = await asyncio.wait(closings, timeout=30)
            assert not hanging
            consumer.cancel()
            await asyncio.wait([consumer])
            await until(lambda: idle(session) == (0, 0, 0, 0))
            assert not release.is_set()  # the submission was withdrawn, not answered
            release.set()
        gc.collect()
    assert not reported


@both
async def test_a_busy_close_can_be_cancelled_everywhere(
    late: bool,
) -> None:
    """Whenever a close is cancelled, a second one completes it, and every waiter ends."""
    for number in range(1, 80):
        tasks = Tasks()
        async with ScriptedServer(tasks) as server:
            session = await server.session(
                notifications=tasks.queue, permits=2, poll_first=60
            ).__aenter__()
            tasks.silent = True
            handles = [session.submit(Captioning(URL)) for _ in range(3)]
            await handles[0].accepted()
            waiters = [asyncio.create_task(_await(handle)) for handle in handles]
            calls = [
                asyncio.create_task(session.analyze(request))
                for request in requests_of(3, Captioning)
            ]

            async def consume(session: AnalyzeSession = session) -> None:
                async with session.map(requests_of(4, Captioning), mode="task") as stream:
                    async for _ in stream:
                        pass

            calls.append(asyncio.create_task(consume()))
            await asyncio.sleep(0)
            steps = Suspensions(number, late)
            closing = asyncio.create_task(steps.drive(session.aclose(drain=0.01)))
            await asyncio.wait([closing], timeout=30)
            assert closing.done(), f"the close hangs when cancelled at {number}"
            await asyncio.wait_for(session.aclose(), 30)
            ended, hanging = await asyncio.wait([*waiters, *calls], timeout=30)
            assert not hanging, f"waiters hang when the close is cancelled at {number}"
            for task in ended:
                assert not task.cancelled()
                assert isinstance(task.exception(), AnalyzeError | None)
            assert all(handle.done() for handle in handles)
            assert idle(session) == (0, 0, 0, 0)
            await until(lambda: not library_tasks())
            if not closing.cancelled() and steps.count < number:
                return
    raise AssertionError("it never completed")


async def _await(handle: Any) -> object:
    return await handle


async def find_the_end(attempt: Callable[[int], Any], *, most: int = 60) -> int:
    """Cancel at the first suspension, then at the second, until one is never reached."""
    for number in range(1, most):
        if await attempt(number):
            return number
    raise AssertionError("it never completed")


@both
async def test_the_asgi_receiver_can_be_cancelled_everywhere(
    late: bool, clock: ManualClock
) -> None:
    queue: asyncio.Queue[Delivery] = asyncio.Queue()
    receiver = AsgiReceiver(queue, CREDENTIALS, clock=clock)
    body = build_answer("t1")
    headers = [
        (name.lower().encode(), value.encode())
        for name, value in sign(body, at=clock.wall()).items()
    ]

    async def attempt(number: int) -> bool:
        parts = [body[:20], body[20:]]
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            await asyncio.sleep(0)
            return {"type": "http.request", "body": parts.pop(0), "more_body": bool(parts)}

        async def send(message: Any) -> None:
            await asyncio.sleep(0)
            sent.append(message)

        steps = Suspensions(number, late)
        scope = {"type": "http", "method": "POST", "headers": headers}
        task = asyncio.create_task(steps.drive(receiver(scope, receive, send)))
        await asyncio.wait([task], timeout=30)
        assert task.done(), f"it hangs when cancelled at {number}"
        assert clock.next_at is None  # no timeout is left running
        stored = queue.qsize()
        assert stored <= 1
        if sent:
            assert (sent[0]["status"], stored) == (200, 1)
        while not queue.empty():
            assert queue.get_nowait().body == body
        return not task.cancelled() and steps.count < number

    assert await find_the_end(attempt) > 3


@both
async def test_the_aiohttp_receiver_can_be_cancelled_everywhere(
    late: bool, clock: ManualClock
) -> None:
    queue: asyncio.Queue[Delivery] = asyncio.Queue()
    receiver = AiohttpReceiver(queue, CREDENTIALS, clock=clock)
    body = build_answer("t1", "a" * 300_000)
    steps = Suspensions(0)

    async def handle(request: web.Request) -> web.StreamResponse:
        return await steps.drive(receiver.handle(request))

    async with serve_aiohttp(handle) as origin:

        async def attempt(number: int) -> bool:
            nonlocal steps
            steps = Suspensions(number, late)
            headers = sign(body, at=clock.wall())
            status = None
            async with aiohttp.ClientSession() as client:
                with contextlib.suppress(aiohttp.ClientError):
                    async with client.post(origin, data=_chunks(body), headers=headers) as reply:
                        status = reply.status
            await until(lambda: clock.next_at is None)
            stored = queue.qsize()
            if status == 200:
                assert stored == 1
            while not queue.empty():
                assert queue.get_nowait().body == body
            return status == 200 and steps.count < number

        assert await find_the_end(attempt) > 1


async def _chunks(body: bytes) -> AsyncIterator[bytes]:
    for begin in range(0, len(body), 100_000):
        yield body[begin : begin + 100_000]
        await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def serve_aiohttp(handle: Any) -> AsyncIterator[str]:
    app = web.Application()
    app.router.add_post("/", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield f"http://127.0.0.1:{runner.addresses[0][1]}/"
    finally:
        await runner.cleanup()


async def count_clients(server: RedisServer) -> int:
    """Return how many connections the server has, without the one that asks."""
    from redis.asyncio import Redis

    async with Redis.from_url(server.url) as client:
        return len(await client.client_list()) - 1


@both
async def test_a_put_into_redis_can_be_cancelled_everywhere(
    shared_redis: RedisServer, late: bool
) -> None:
    before = await count_clients(shared_redis)
    namespace = f"put-{late}"
    async with RedisNotifications(shared_redis.url, namespace=namespace) as notifications:

        async def attempt(number: int) -> bool:
            steps = Suspensions(number, late)
            delivery = build_delivery(f"t{number}")
            task = asyncio.create_task(steps.drive(notifications.put(delivery)))
            await asyncio.wait([task], timeout=30)
            assert task.done(), f"it hangs when cancelled at {number}"
            await notifications.put(delivery)  # storing it again changes nothing
            (found,) = await notifications.fetch([f"t{number}"])
            assert found.body == delivery.body
            return not task.cancelled() and steps.count < number

        assert await find_the_end(attempt) > 1
        assert await count_clients(shared_redis) <= before + 2  # the pool lost no connection
    await _until_clients(shared_redis, before)


@both
async def test_a_fetch_from_redis_can_be_cancelled_everywhere(
    shared_redis: RedisServer, late: bool
) -> None:
    before = await count_clients(shared_redis)
    for number in range(1, 60):
        namespace = f"fetch-{late}-{number}"
        async with RedisNotifications(shared_redis.url, namespace=namespace) as notifications:
            await notifications.put(build_delivery("t1"))
            steps = Suspensions(number, late)
            task = asyncio.create_task(steps.drive(notifications.fetch(["t1"])))
            await asyncio.wait([task], timeout=30)
            assert task.done(), f"it hangs when cancelled at {number}"
            assert len(await notifications.fetch(["t1"])) == 1
        await _until_clients(shared_redis, before)
        if not task.cancelled() and steps.count < number:
            return
    raise AssertionError("it never completed")


@both
async def test_listening_to_redis_can_be_cancelled_everywhere(
    shared_redis: RedisServer, late: bool
) -> None:
    """A listener that was cancelled leaves no connection, and the next one hears everything."""
    before = await count_clients(shared_redis)
    reached = 0
    for number in range(1, 25):
        namespace = f"listen-{late}-{number}"
        async with RedisNotifications(shared_redis.url, namespace=namespace) as notifications:
            await notifications.fetch(["t1"])  # awaited from now on

            async def hear(notifications: RedisNotifications = notifications) -> str:
                listening = notifications.listen()
                async with contextlib.aclosing(listening):
                    async for delivery in listening:
                        return str(json.loads(delivery.body)["task_id"])
                raise AssertionError("it ended")

            steps = Suspensions(number, late)
            task = asyncio.create_task(steps.drive(hear()))
            await asyncio.sleep(0.002)
            await notifications.put(build_delivery("t1"))
            _, hanging = await asyncio.wait([task], timeout=30)
            assert not hanging, f"it hangs when cancelled at {number}"
            reached += steps.count >= number
            if task.cancelled():
                (found,) = await notifications.fetch(["t1"])
                assert json.loads(found.body)["task_id"] == "t1"
            else:
                assert task.result() == "t1"
        await _until_clients(shared_redis, before)
    assert reached > 2


async def _until_clients(server: RedisServer, count: int) -> None:
    async with asyncio.timeout(30):
        while await count_clients(server) > count:
            await asyncio.sleep(0.005)
