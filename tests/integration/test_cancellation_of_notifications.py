"""Cancelled at any suspension, receivers and sources lose no delivery and leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from notification_support import CREDENTIALS, RedisServer, build_answer, build_delivery, sign
from scripted import Suspensions, cancel_at, serve_aiohttp, until
from task_support import Service, build_result, library_tasks, resolving, submit
from task_support import sign as sign_delivery

from cloudinary_analyze import Delivery, NotificationSource
from cloudinary_analyze.notifications.aiohttp import WebhookReceiver as AiohttpReceiver
from cloudinary_analyze.notifications.asgi import WebhookReceiver as AsgiReceiver
from cloudinary_analyze.notifications.redis import RedisNotifications
from cloudinary_analyze.testing import ManualClock

both = pytest.mark.parametrize("late", [False, True])


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
            delivery = build_delivery(f"t{number}")
            ended = await cancel_at(number, notifications.put(delivery), late=late)
            await notifications.put(delivery)  # storing it again changes nothing
            (found,) = await notifications.fetch([f"t{number}"])
            assert found.body == delivery.body
            return ended

        assert await find_the_end(attempt) > 1
        assert await count_clients(shared_redis) <= before + 2  # the pool lost no connection
    await _until_clients(shared_redis, before)


@both
async def test_a_fetch_from_redis_can_be_cancelled_everywhere(
    shared_redis: RedisServer, late: bool
) -> None:
    before = await count_clients(shared_redis)

    async def attempt(number: int) -> bool:
        namespace = f"fetch-{late}-{number}"
        async with RedisNotifications(shared_redis.url, namespace=namespace) as notifications:
            await notifications.put(build_delivery("t1"))
            ended = await cancel_at(number, notifications.fetch(["t1"]), late=late)
            assert len(await notifications.fetch(["t1"])) == 1
        await _until_clients(shared_redis, before)
        return ended

    await find_the_end(attempt)


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


@both
async def test_the_source_is_closed_wherever_listening_is_cancelled(
    late: bool, clock: ManualClock
) -> None:
    """The session's close cancels the listening wherever it is. The source is informed."""
    closed = []

    class Source(NotificationSource):
        async def listen(self) -> AsyncIterator[Delivery]:
            try:
                for index in range(3):
                    await asyncio.sleep(0)
                    yield sign_delivery(build_result(f"t{index}"))
            finally:
                closed.append(True)

        async def fetch(self, task_ids: Any) -> list[Delivery]:
            await asyncio.sleep(0)
            return [sign_delivery(build_result(task_id)) for task_id in task_ids]

    for number in range(1, 12):
        closed.clear()
        steps = Suspensions(number, late)
        async with resolving(Service(clock), source=Source()) as tracker:
            await submit(tracker)
            listening = asyncio.create_task(steps.drive(tracker.listener._listen()))
            await asyncio.wait([listening], timeout=30)
            assert listening.done()
        assert closed
        assert not library_tasks()
        if steps.count < number:
            return
    raise AssertionError("it never completed")
