"""`listen` and `run --receive`, under attack by clients that open connections and send little."""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from cli_support import end, see, start
from scripted import KEY, SECRET, until

from cloudinary_analyze import Credentials, Delivery
from cloudinary_analyze.cli.connections import LIMITS, Limits
from cloudinary_analyze.cli.notifications import serve
from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.notifications.aiohttp import WebhookReceiver
from cloudinary_analyze.testing import sign_notification

CREDENTIALS = Credentials("demo", KEY, SECRET)
BODY = b'{"task_id":"t","data":{}}'
SHORT = Limits(connections=8, wait_seconds=0.5)
PATIENT = Limits(connections=8, wait_seconds=60)


class Receiver:
    """A receiver, and what it stored."""

    def __init__(self, port: int, queue: asyncio.Queue[Delivery]) -> None:
        self.port, self.queue = port, queue

    async def connect(self, sent: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(sent)
        await writer.drain()
        return reader, writer


@contextlib.asynccontextmanager
async def receive(limits: Limits) -> AsyncIterator[Receiver]:
    queue: asyncio.Queue[Delivery] = asyncio.Queue()
    async with serve(WebhookReceiver(queue, CREDENTIALS).handle, "127.0.0.1", 0, limits) as origin:
        yield Receiver(int(origin.rpartition(":")[2]), queue)


def build_post(body: bytes = BODY, *, length: int | None = None, close: bool = True) -> bytes:
    headers = sign_notification(body, CREDENTIALS)
    head = [
        "POST / HTTP/1.1",
        "Host: a",
        f"Content-Length: {len(body) if length is None else length}",
        *(["Connection: close"] if close else []),
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


async def post(receiver: Receiver) -> bytes:
    """Send an honest webhook; return the beginning of the response."""
    async with asyncio.timeout(30):
        reader, writer = await receiver.connect(build_post())
        response = await reader.read()
        writer.close()
    return response[:15]


async def is_closed(reader: asyncio.StreamReader) -> bool:
    """Wait until the server has closed a connection."""
    with contextlib.suppress(ConnectionError):
        while await reader.read(65_536):
            pass
    return True


def test_the_limits_are_seconds_and_below_the_descriptors() -> None:
    assert LIMITS.wait_seconds <= 10
    assert LIMITS.connections <= 600


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"P",
        b"POST / HTTP/1.1\r\nHost: a\r\nX-A: ",
        build_post(close=False),
        build_post(close=False) + b"POST / HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nContent-Length: 1000\r\n\r\n",
        build_post(b"{}", length=2**21, close=False),
    ],
    ids=["idle", "byte", "head", "kept alive", "second head", "405", "405 body", "413 body"],
)
async def test_connections_that_send_too_little_are_closed(sent: bytes) -> None:
    async with receive(SHORT) as receiver, asyncio.timeout(30):
        reader, writer = await receiver.connect(sent)
        assert await is_closed(reader)
        writer.close()
        assert await post(receiver) == b"HTTP/1.1 200 OK"


async def test_a_request_that_is_served_is_not_cut_off() -> None:
    class Slow(asyncio.Queue[Delivery]):
        async def put(self, delivery: Delivery) -> None:
            await asyncio.sleep(4 * SHORT.wait_seconds)
            await super().put(delivery)

    handle = WebhookReceiver(Slow(), CREDENTIALS).handle
    async with serve(handle, "127.0.0.1", 0, SHORT) as origin:
        receiver = Receiver(int(origin.rpartition(":")[2]), Slow())
        assert await post(receiver) == b"HTTP/1.1 200 OK"


async def test_requests_that_are_not_http_print_no_traceback(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with receive(SHORT) as receiver, asyncio.timeout(8):
        for sent in (b"SSH-2.0-OpenSSH\r\n\r\n", b"GET / HTTP/1.1\r\nA\x00: b\r\n\r\n"):
            reader, writer = await receiver.connect(sent)
            assert await is_closed(reader)
            writer.close()
    assert not [record for record in caplog.records if record.exc_info]


async def test_slow_headers_gain_no_time() -> None:
    async with receive(SHORT) as receiver, asyncio.timeout(30):
        reader, writer = await receiver.connect(b"POST / HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionError):
            for number in range(1000):
                if reader.at_eof():
                    break
                writer.write(b"X-%d: a\r\n" % number)
                await writer.drain()
                await asyncio.sleep(0.01)
        assert number < 500
        writer.close()


async def test_a_sender_that_reads_nothing_is_closed() -> None:
    """Many requests at once fill the buffers of its responses."""
    async with receive(SHORT) as receiver:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            client.setblocking(False)
            loop = asyncio.get_running_loop()
            await loop.sock_connect(client, ("127.0.0.1", receiver.port))
            flood = b"GET /%b HTTP/1.1\r\nHost: a\r\n\r\n" % (b"a" * 100) * 1000

            async def send() -> None:
                while True:
                    await loop.sock_sendall(client, flood)

            with pytest.raises(ConnectionError):
                await asyncio.wait_for(send(), 30)
        assert await post(receiver) == b"HTTP/1.1 200 OK"


@pytest.mark.parametrize(
    "sent",
    [b"", b"POST / HTTP/1.1\r\n", build_post(b"{", length=100)],
    ids=["idle", "head", "body"],
)
async def test_strangers_keep_no_webhook_out(sent: bytes) -> None:
    """No timeout has to expire, because the oldest waiting connection makes room."""
    async with receive(PATIENT) as receiver:
        strangers = [await receiver.connect(sent) for _ in range(50)]
        for _ in range(3):
            assert await post(receiver) == b"HTTP/1.1 200 OK"
        readers = [reader for reader, _ in strangers]
        async with asyncio.timeout(30):
            assert all([await is_closed(reader) for reader in readers[:42]])
        assert not any(reader.at_eof() for reader in readers[-4:])
        for _, writer in strangers:
            writer.close()
    assert receiver.queue.qsize() == 3


async def test_connections_that_store_a_webhook_stay_open() -> None:
    """A connection whose webhook is being stored stays open. A new connection is closed instead."""
    stored = asyncio.Event()
    begun = 0

    class Sink:
        async def put(self, delivery: Delivery, /) -> None:
            nonlocal begun
            begun += 1
            await stored.wait()

    handle = WebhookReceiver(Sink(), CREDENTIALS).handle
    async with serve(handle, "127.0.0.1", 0, PATIENT) as origin:
        receiver = Receiver(int(origin.rpartition(":")[2]), asyncio.Queue())
        busy = [asyncio.create_task(post(receiver)) for _ in range(8)]
        await until(lambda: begun == 8)
        reader, writer = await receiver.connect(build_post())
        async with asyncio.timeout(30):
            assert await is_closed(reader)
        writer.close()
        stored.set()
        assert await asyncio.gather(*busy) == [b"HTTP/1.1 200 OK"] * 8
        assert await post(receiver) == b"HTTP/1.1 200 OK"


async def test_a_connection_serves_many_webhooks() -> None:
    async with receive(PATIENT) as receiver:
        reader, writer = await receiver.connect()
        for _ in range(20):
            writer.write(build_post(close=False))
            async with asyncio.timeout(30):
                assert (await reader.readline()).startswith(b"HTTP/1.1 200")
                await reader.readuntil(b"Stored.")
        writer.close()
    assert receiver.queue.qsize() == 20


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
@pytest.mark.parametrize("sent", [b"", b"POST / HTTP/1.1\r\nX-A: "], ids=["idle", "head"])
async def test_listen_withstands_1000_connections(
    tmp_path: Path, many_descriptors: None, sent: bytes
) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))

    async with Emulator() as emulator:
        async with start(
            "listen", "--port", "0", folder=tmp_path, emulator=emulator, preexec_fn=limit
        ) as process:
            address = (await see(process, "Ctrl-C ends it")).split("http://")[1].split("/")[0]
            receiver = Receiver(int(address.rpartition(":")[2]), asyncio.Queue())
            strangers = [await receiver.connect(sent) for _ in range(1000)]
            credentials = Credentials.from_url(emulator.cloudinary_url)
            body, begun = BODY, time.monotonic()
            lines = [f"{k}: {v}" for k, v in sign_notification(body, credentials).items()]
            head = "\r\n".join(
                ["POST / HTTP/1.1", "Host: a", f"Content-Length: {len(body)}", *lines]
            )
            reader, writer = await receiver.connect(head.encode() + b"\r\n\r\n" + body)
            async with asyncio.timeout(30):
                assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            async with asyncio.timeout(30):
                assert all([await is_closed(one) for one, _ in strangers])
            assert time.monotonic() - begun < 15
            for _, one in [*strangers, (reader, writer)]:
                one.close()
            process.send_signal(2)
            code, out, _ = await end(process)
    assert code == 0
    assert len(out.splitlines()) == 1
