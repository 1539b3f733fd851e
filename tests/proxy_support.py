"""A small HTTP proxy on loopback: it tunnels (CONNECT), forwards plain http, or fails on purpose."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import Self

import attrs

HEAD_END = b"\r\n\r\n"


@attrs.frozen
class Head:
    """The head of a request that a client sent to the proxy.

    Attributes:
        line: The request line.
        headers: Names in lower case.
    """

    line: str
    headers: dict[str, str]


@attrs.define(eq=False)
class Proxy:
    """Forwards every connection to one local port, for any requested host.

    Attributes:
        port: The port of the service.
        reply: Bytes to send instead of forwarding. Empty bytes hang up; ``None`` forwards.
        silent: Whether to accept and never answer.
        context: The TLS context of the proxy's listener, if any.
        heads: The heads of the requests that the proxy received.
    """

    port: int
    reply: bytes | None = None
    silent: bool = False
    context: ssl.SSLContext | None = None
    heads: list[Head] = attrs.field(factory=list)
    url: str = ""
    _server: asyncio.Server | None = None
    _serving: set[asyncio.Task[None]] = attrs.field(factory=set)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._track, "127.0.0.1", 0, ssl=self.context)
        scheme = "http" if self.context is None else "https"
        host = "127.0.0.1" if self.context is None else "localhost"
        self.url = f"{scheme}://{host}:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _track(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._serve(reader, writer)
        finally:
            writer.close()
            self._serving.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raw = await reader.readuntil(HEAD_END)
        line, *lines = raw.decode().removesuffix("\r\n\r\n").split("\r\n")
        pairs = (one.partition(": ") for one in lines)
        self.heads.append(Head(line, {name.lower(): value for name, _, value in pairs}))
        if self.silent:
            await asyncio.sleep(60)
        if self.reply is not None:
            writer.write(self.reply)
            await writer.drain()
            return
        service, upstream = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            if line.startswith("CONNECT "):
                writer.write(b"HTTP/1.1 200 Connection established" + HEAD_END)
            else:  # further requests on this connection are forwarded too, with absolute URLs
                upstream.write(raw)
            await asyncio.gather(_copy(reader, upstream), _copy(service, writer))
        finally:
            upstream.close()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65_536):
        writer.write(data)
        await writer.drain()
    writer.close()
