"""A TCP proxy that breaks connections, requests and responses by plan, and the process that runs it.

It belongs between a client and an emulator. All choices depend on the seed, the item and the
number of its attempt, so that a run can be repeated. As a program, it serves an emulator behind the
proxy, and answers each line on stdin with what both counted::

    python tests/chaos/faulty_proxy.py '{"options": …, "faults": …}'
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import socket
import ssl
import struct
import sys
from collections import Counter
from collections.abc import Coroutine, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any, Self

import attrs

from cloudinary_analyze.emulator import Emulator, FaultPlan, WebhookPolicy

CERTIFICATE = Path(__file__).parents[1] / "untrusted.pem"  # of localhost
RESET = struct.pack("ii", 1, 0)  # a close that lingers for 0 s sends a reset
ITEM = re.compile(rb"/(\d+)\.jpg")
LENGTH = re.compile(rb"\r\ncontent-length: (\d+)", re.IGNORECASE)

BEFORE = ("reset_before", "close_race")  # the service never gets the request
AFTER = ("reset_after", "half_written", "stalled_headers")  # the client never gets the response
HARMLESS = ("slow_bytes", "idle_close")
OF_CONNECTIONS = ("reset_at_accept", "tls_failure")


@attrs.frozen(kw_only=True)
class ProxyPlan:
    """The faults to inject.

    Attributes:
        seed: Determines which attempts and connections the faults hit.
        faults: The probability of each fault, per attempt or per connection.
        scripted: What is answered to the first attempt of an item instead of forwarding it: a name
            for the counts, the status, the body and Retry-After. ``@soon@`` is a date in a second.
    """

    seed: int = 0
    faults: Mapping[str, float] = attrs.field(factory=dict)
    scripted: Mapping[int, tuple[str, int, str, str | None]] = attrs.field(factory=dict)

    def choose(self, names: tuple[str, ...], *what: object) -> str | None:
        """Return the fault of an attempt or a connection, if there is one."""
        roll = random.Random(f"{self.seed} {what}").random()
        for name in names:
            roll -= self.faults.get(name, 0.0)
            if roll < 0:
                return name
        return None


def build_response(status: int, body: str, retry_after: str | None) -> bytes:
    """Return a scripted response."""
    soon = datetime.now(UTC) + timedelta(seconds=1)
    body = body.replace("@soon@", soon.isoformat())
    wait = ""
    if retry_after is not None:
        wait = (
            f"Retry-After: {retry_after.replace('@soon@', format_datetime(soon, usegmt=True))}\r\n"
        )
    head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n{wait}"
    return f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()


@attrs.define(eq=False)
class FaultyProxy:
    """Forwards to one local port. ``counts`` holds the number of each injected fault.

    Faults of polls are counted apart, as ``poll …``. ``raced`` counts requests that crossed the
    close of an idle connection, ``abandoned`` charged responses whose client was gone.
    """

    target: int
    plan: ProxyPlan
    tls: bool = False
    counts: Counter[str] = attrs.field(factory=Counter)
    port: int = 0
    attempts: Counter[object] = attrs.field(factory=Counter)
    peers: set[asyncio.Protocol] = attrs.field(factory=set)
    _tasks: set[asyncio.Task[None]] = attrs.field(factory=set)
    _context: ssl.SSLContext | None = None
    _server: asyncio.Server | None = None

    async def __aenter__(self) -> Self:
        if self.tls:
            self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
            self._context.load_cert_chain(CERTIFICATE)
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Client(self), "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for peer in list(self.peers):
            peer.transport.abort()  # type: ignore[attr-defined]
        await self._server.wait_closed()

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Client(asyncio.Protocol):
    """A connection of a client: one request after the other."""

    transport: asyncio.Transport

    def __init__(self, proxy: FaultyProxy) -> None:
        self.proxy = proxy
        self.received = b""
        self.used = False
        self.refuses = False  # no TLS is spoken
        self.half_closed = False
        self.closed = False
        self.upstream: _Upstream | None = None
        self.fault: str | None = None
        self.kind = ""  # kind of the request that waits for its response

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        proxy = self.proxy
        proxy.peers.add(self)
        proxy.counts["connections"] += 1
        names = OF_CONNECTIONS if proxy.tls else OF_CONNECTIONS[:1]
        fault = proxy.plan.choose(names, "connection", proxy.counts["connections"])
        if fault is not None:
            proxy.counts[fault] += 1
        if fault == "reset_at_accept":
            self.reset()
        elif fault == "tls_failure":
            self.refuses = True
        elif proxy._context is not None:
            transport.pause_reading()  # the TLS protocol must read the handshake
            proxy.spawn(self._start_tls(proxy._context))

    async def _start_tls(self, context: ssl.SSLContext) -> None:
        loop = asyncio.get_running_loop()
        try:
            transport = await loop.start_tls(self.transport, self, context, server_side=True)
        except OSError:  # the client left
            return
        assert transport is not None
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self.closed = True
        self.proxy.peers.discard(self)
        if self.upstream is not None and not self.kind:
            self.upstream.transport.abort()

    def eof_received(self) -> None:
        return None  # closes

    def data_received(self, data: bytes) -> None:
        if self.refuses:
            self.transport.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            self.transport.close()
            return
        if self.half_closed:
            self.proxy.counts["raced" if data.startswith(b"POST") else "poll raced"] += 1
            self.transport.abort()
            return
        self.received += data
        head, end, rest = self.received.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if end and len(rest) >= (int(length[1]) if length else 0):
            request, self.received = self.received, b""
            self.handle(request, head.startswith(b"POST"))

    def handle(self, request: bytes, calls: bool) -> None:
        proxy, number = self.proxy, None
        if calls and (found := ITEM.search(request)):
            number = int(found[1])
        proxy.attempts[number] += 1
        attempt = proxy.attempts[number]
        self.kind = "call" if calls else "poll"
        if number is not None and attempt == 1 and number in proxy.plan.scripted:
            name, *response = proxy.plan.scripted[number]
            proxy.counts[name] += 1
            self.write(build_response(*response))
            return
        self.fault = proxy.plan.choose((*BEFORE, *AFTER, *HARMLESS), number, attempt)
        if self.fault == "reset_before":
            self.count("reset_before")
            self.reset()
        elif self.fault == "close_race" and self.used:
            self.count("close_race")
            self.transport.close()
        elif self.upstream is None:
            proxy.spawn(self._connect(request))
        else:
            self.upstream.transport.write(request)

    def count(self, what: str) -> None:
        self.proxy.counts[what if self.kind == "call" else f"poll {what}"] += 1

    async def _connect(self, request: bytes) -> None:
        loop = asyncio.get_running_loop()
        _, self.upstream = await loop.create_connection(
            lambda: _Upstream(self), "127.0.0.1", self.proxy.target
        )
        self.upstream.transport.write(request)

    def respond(self, response: bytes) -> None:
        """Forward a response of the service, or the part of it that the plan allows."""
        fault, kind = self.fault, self.kind
        # a response that the service itself truncated is not counted as paid
        paid = response[9:12] in (b"200", b"202") and response.endswith(b"}")
        if self.closed or self.transport.is_closing():
            if paid:
                self.count("abandoned")
            self.kind = ""
            if self.upstream is not None:
                self.upstream.transport.abort()
            return
        if fault in AFTER and paid:
            self.count(fault)
            self.kind = ""
            if fault == "reset_after":
                self.reset()
            elif fault == "half_written":
                self.transport.write(response[: len(response) - 20])
                self.transport.close()
            else:
                # the rest never follows, so the client gives up
                self.transport.write(response[:30])
        elif fault == "slow_bytes":
            self.count(fault)
            self.proxy.spawn(self._write_slowly(response))
        elif fault == "idle_close" and kind == "call":
            self.count(fault)
            self.write(response)
            chance = random.Random(response)
            asyncio.get_running_loop().call_later(chance.random() * 0.002, self.close_half)
        else:
            self.write(response)

    async def _write_slowly(self, response: bytes) -> None:
        step = len(response) // 8 + 1
        for start in range(0, len(response), step):
            if start:
                await asyncio.sleep(0.01)
            if self.transport.is_closing():
                self.count("abandoned")
                return
            if start + step < len(response):
                self.transport.write(response[start : start + step])
            else:
                self.write(response[start:])

    def write(self, response: bytes) -> None:
        self.used, self.kind = True, ""
        self.transport.write(response)

    def close_half(self) -> None:
        """Close the sending side of an idle connection. Keep reading to detect a request that crosses it."""
        if self.kind or self.closed or self.transport.is_closing():
            return
        self.half_closed = True
        with self.find_socket() as connection:
            connection.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Close the connection with a reset."""
        with self.find_socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self.transport.abort()

    def find_socket(self) -> socket.socket:
        """Return a duplicate of the socket, because sockets of uvloop lack these methods."""
        return socket.socket(fileno=os.dup(self.transport.get_extra_info("socket").fileno()))


class _Upstream(asyncio.Protocol):
    """The connection to the service on behalf of one client connection."""

    transport: asyncio.Transport

    def __init__(self, client: _Client) -> None:
        self.client = client
        self.received = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.client.proxy.peers.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        client = self.client
        client.proxy.peers.discard(self)
        client.upstream = None
        if client.kind and not client.closed:
            client.reset()  # a fault of the service itself

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, end, rest = self.received.partition(b"\r\n\r\n")
        length = LENGTH.search(head)
        if end and len(rest) >= (int(length[1]) if length else 0):
            response, self.received = self.received, b""
            self.client.respond(response)


async def serve(job: dict[str, Any]) -> None:
    """Run an emulator behind a proxy until stdin ends."""
    loop = asyncio.get_running_loop()
    lines = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
    emulator = Emulator(
        faults=FaultPlan(**job["service_faults"]),
        webhooks=WebhookPolicy(**job["webhooks"]),
        seed=job["seed"],
        **job["options"],
    )
    plan = ProxyPlan(
        seed=job["seed"],
        faults=job["faults"],
        scripted={int(number): response for number, response in job["scripted"].items()},
    )
    async with emulator, FaultyProxy(int(emulator.url.rpartition(":")[2]), plan, tls=True) as proxy:
        print(json.dumps([emulator.cloudinary_url, proxy.port]), flush=True)
        while await lines.readline():
            while emulator.counts.in_flight:
                await asyncio.sleep(0.01)
            counts = emulator.counts
            tasks = Counter(fault for task in emulator.tasks.values() for fault in task.faults)
            print(
                json.dumps(
                    {
                        "done": counts.total_done,
                        "per_source": [*Counter(counts.done.values()).items()],
                        "proxy": proxy.counts,
                        "service": counts.http_faults,
                        "webhooks": counts.webhooks,
                        "refused webhooks": counts.webhooks_refused,
                        "tasks": tasks,
                    }
                ),
                flush=True,
            )


if __name__ == "__main__":
    asyncio.run(serve(json.loads(sys.argv[1])))
