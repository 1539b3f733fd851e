"""Both receivers over real sockets, with every framework in the documentation."""

import asyncio
import contextlib
import io
import logging
from urllib.parse import urlsplit

import aiohttp
import pytest
from fastapi import FastAPI
from notification_support import CREDENTIALS, build_answer, serve_asgi, sign, until
from scripted import serve_aiohttp
from starlette.applications import Starlette
from starlette.routing import Route

from cloudinary_analyze import AnalyzeSession, Captioning, Credentials
from cloudinary_analyze.emulator import Emulator, WebhookPolicy
from cloudinary_analyze.notifications import aiohttp as for_aiohttp
from cloudinary_analyze.notifications import asgi
from cloudinary_analyze.notifications.receiver import MAX_BODY, SINK_SECONDS

PATH = "/hooks/cloudinary"


def wrap_fastapi_route(receiver):
    app = FastAPI()
    app.add_route(PATH, receiver)
    return app


SERVERS = {
    "bare": lambda **options: serve_asgi(asgi.WebhookReceiver(**options)),
    "starlette": lambda **options: serve_asgi(
        Starlette(routes=[Route(PATH, endpoint=asgi.WebhookReceiver(**options))])
    ),
    "fastapi": lambda **options: serve_asgi(
        FastAPI(routes=[Route(PATH, endpoint=asgi.WebhookReceiver(**options))])
    ),
    "fastapi add_route": lambda **options: serve_asgi(
        wrap_fastapi_route(asgi.WebhookReceiver(**options))
    ),
    "aiohttp": lambda **options: serve_aiohttp(for_aiohttp.WebhookReceiver(**options).handle),
}
every_server = pytest.mark.parametrize("server", SERVERS)
both_receivers = pytest.mark.parametrize("server", ["bare", "aiohttp"])


@contextlib.asynccontextmanager
async def receive(server, sink, clock):
    """Serve a receiver and yield its URL and a client that follows no redirect."""
    options = {"sink": sink, "credentials": CREDENTIALS, "clock": clock}
    async with SERVERS[server](**options) as origin, aiohttp.ClientSession() as client:

        async def send(body, headers=None, method="POST"):
            headers = sign(body, at=clock.wall()) if headers is None else headers
            async with client.request(
                method,
                origin + PATH,
                data=io.BytesIO(body) if type(body) is bytes else body,
                headers=headers,
                allow_redirects=False,
            ) as response:
                return response.status, dict(response.headers)

        yield origin, send


@every_server
async def test_the_printed_url_itself_takes_a_webhook_byte_for_byte(server, clock):
    queue = asyncio.Queue()
    async with receive(server, queue, clock) as (_, send):
        body = build_answer("t1", "ü ")
        assert (await send(body))[0] == 200
        delivery = queue.get_nowait()
        assert (delivery.body, delivery.received_at) == (body, clock.wall())
        assert (await send(body, sign(body, at=clock.wall(), secret="x")))[0] == 401
        assert (await send(body, {}))[0] == 401
        status, headers = await send(b"", method="GET")
        assert (status, headers.get("Allow")) == (405, "POST")
        assert queue.empty()


@both_receivers
async def test_a_body_of_one_mebibyte_is_taken_and_a_longer_one_refused(server, clock):
    async def in_chunks(body):
        for begin in range(0, len(body), 1 << 16):
            yield body[begin : begin + (1 << 16)]

    queue = asyncio.Queue()
    async with receive(server, queue, clock) as (_, send):
        bare = build_answer("t1", "")
        longest = build_answer("t1", "a" * (MAX_BODY - len(bare)))
        too_long = longest + b" "
        assert (await send(longest))[0] == 200
        assert (await send(in_chunks(longest), sign(longest, at=clock.wall())))[0] == 200
        for body in (too_long, in_chunks(too_long)):
            try:
                status, _ = await send(body, sign(too_long, at=clock.wall()))
            except aiohttp.ClientOSError:
                status = 413  # it closed the connection while the rest was being sent
            assert status == 413
        assert queue.qsize() == 2


async def open_slow(origin, clock):
    """Begin a webhook whose body never ends."""
    parts = urlsplit(origin)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    headers = "".join(f"{name}: {value}\r\n" for name, value in sign(b"", at=clock.wall()).items())
    head = f"POST {PATH} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n{headers}\r\n"
    writer.write(head.encode() + b"{")
    await until(lambda: clock.next_at is not None)
    return reader, writer


@both_receivers
async def test_a_body_has_ten_seconds_to_arrive(server, clock):
    queue = asyncio.Queue()
    async with receive(server, queue, clock) as (origin, _):
        reader, writer = await open_slow(origin, clock)
        await clock.advance(9.9)
        assert clock.next_at is not None
        await clock.advance(0.2)
        try:
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
        finally:
            writer.close()
            await writer.wait_closed()
        assert answer.startswith(b"HTTP/1.1 408 ")
        assert b"connection: close" in answer.lower()


@both_receivers
async def test_a_sender_that_goes_away_midway_leaves_nothing_behind(server, clock, caplog):
    queue = asyncio.Queue()
    async with receive(server, queue, clock) as (origin, send):
        _, writer = await open_slow(origin, clock)
        writer.transport.abort()
        await until(lambda: clock.next_at is None)
        assert queue.empty()
        assert (await send(build_answer("t1")))[0] == 200
    # threads of other tests may start event loops
    assert [r for r in caplog.records if (r.name, r.levelno) != ("asyncio", logging.DEBUG)] == []


@both_receivers
async def test_a_sender_must_try_again_while_the_sink_is_full(server, clock):
    queue = asyncio.Queue(maxsize=1)
    queue.put_nowait(None)
    async with receive(server, queue, clock) as (_, send):
        body = build_answer("t1")
        sending = asyncio.create_task(send(body))
        await until(lambda: clock.next_at is not None)
        await clock.advance(SINK_SECONDS + 0.1)
        assert (await sending)[0] == 503
        queue.get_nowait()
        assert (await send(body))[0] == 200


@both_receivers
async def test_a_task_is_resolved_although_the_sink_failed_at_first(server):
    """The 503 makes the service send the webhook again."""

    class FailsOnce(asyncio.Queue):
        failed = False

        async def put(self, delivery):
            if not self.failed:
                self.failed = True
                raise ConnectionError("not now")
            await super().put(delivery)

    queue = FailsOnce()
    async with (
        SERVERS[server](sink=queue, credentials=CREDENTIALS) as origin,
        Emulator(task_seconds=0, webhooks=WebhookPolicy(retry_scale=0.0001)) as emulator,
        AnalyzeSession(
            Credentials.from_url(emulator.cloudinary_url),
            notifications=queue,
            notification_url=origin + PATH,
        ) as session,
    ):
        response = await session.submit(Captioning(emulator.sample_url(1)), timeout=10)
        assert response.entity == emulator.sample_url(1)
        assert emulator.counts.webhooks == {"genuine": 1, "redelivery": 1}
