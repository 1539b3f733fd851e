"""Bounds the connections of a receiver: how many there are, and how long each may wait.

A connection is *waiting* from its beginning until the whole head of a request has arrived, and again
after each response. Otherwise it is *serving*, and the receiver bounds its time. One that waits too
long is closed. If there are too many, the one that has waited longest makes room for a new one, so
that connections without a request keep no webhook out.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final, cast

import attrs
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

logger: logging.Logger = logging.getLogger("cloudinary_analyze.notifications")


@attrs.frozen(kw_only=True)
class Limits:
    """What a receiver allows.

    Attributes:
        connections: How many may be open.
        wait_seconds: How long one may wait.
    """

    connections: int = 512  # half of the descriptors that most systems allow
    wait_seconds: float = 5.0


LIMITS: Final = Limits()


def build_server_logger() -> logging.Logger:
    """Return aiohttp's logger without the tracebacks of requests that are not valid HTTP.

    Anyone can send these, and each would be a page of text.
    """
    quiet = logging.getLogger("aiohttp.server.receiver")
    quiet.addFilter(_is_fault)
    return quiet


def _is_fault(record: logging.LogRecord) -> bool:
    return not (record.exc_info and isinstance(record.exc_info[1], HttpProcessingError))


@attrs.define(eq=False)
class Connections:
    """The open connections of one server.

    Attributes:
        limits: What is allowed.
        opened: By transport; the one whose state is oldest comes first.
    """

    limits: Limits
    opened: dict[asyncio.BaseTransport, Connection] = attrs.field(factory=dict)
    _warned: bool = False

    def accept(self, build: Callable[[], asyncio.Protocol]) -> Connection:
        """Return the protocol of a new connection around one of aiohttp."""
        return Connection(self, build())

    def admit(self, transport: asyncio.BaseTransport, connection: Connection) -> bool:
        """Add a connection, in place of one that waits if there are too many."""
        if len(self.opened) >= self.limits.connections:
            if not self._warned:
                self._warned = True
                logger.warning(
                    "More than %d connections are open. The receiver closes those that send no "
                    "request. A reverse proxy in front can do so more cheaply.",
                    self.limits.connections,
                )
            oldest = next((one for one in self.opened.values() if one.is_incomplete()), None)
            if oldest is None:
                return False
            oldest.abort()
        self.opened[transport] = connection
        return True

    @web.middleware
    async def track(
        self,
        request: web.Request,
        handler: Callable[[web.Request], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        """Note for each request that its connection serves it; a middleware of aiohttp."""
        transport = request.transport
        connection = None if transport is None else self.opened.get(transport)
        if connection is None:
            return await handler(request)
        connection.serve(request)
        try:
            return await handler(request)
        finally:
            connection.wait()


@attrs.define(eq=False)
class Connection(asyncio.Protocol):
    """One connection. Waiting: `request` is ``None``. Serving: it is not. Closed: not in the table.

    Attributes:
        table: The connections that it belongs to.
        inner: aiohttp's protocol, which reads and writes.
        request: What is served.
    """

    table: Connections
    inner: asyncio.Protocol
    request: web.Request | None = None
    _transport: asyncio.Transport | None = None
    _timer: asyncio.TimerHandle | None = None
    _begun: bool = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, or close at once if there are too many."""
        self._transport = cast("asyncio.Transport", transport)
        self._begun = self.table.admit(transport, self)
        if not self._begun:
            self._transport.abort()
            return
        self.inner.connection_made(transport)
        self.wait()

    def serve(self, request: web.Request) -> None:
        """Serve a request, without a time limit here, because the receiver has its own limits."""
        self.request = request
        self._begin_state()

    def wait(self) -> None:
        """Wait for a request, for a limited time."""
        self.request = None
        if self._begin_state():
            seconds = self.table.limits.wait_seconds
            self._timer = asyncio.get_running_loop().call_later(seconds, self.abort)

    def _begin_state(self) -> bool:
        """Move to the end of the table, as the newest, unless the connection is closed."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        opened, transport = self.table.opened, self._transport
        if transport is None or opened.get(transport) is not self:
            return False
        opened[transport] = opened.pop(transport)
        return True

    def is_incomplete(self) -> bool:
        """Whether a whole request has not arrived yet."""
        return self.request is None or not self.request.content.is_eof()

    def abort(self) -> None:
        """Close the connection, and forget it at once."""
        assert self._transport is not None
        self._forget()
        self._transport.abort()

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._transport is not None:
            self.table.opened.pop(self._transport, None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._forget()
        if self._begun:
            self.inner.connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Pass data on."""
        self.inner.data_received(data)

    def eof_received(self) -> bool | None:
        """Pass the end on."""
        return self.inner.eof_received()

    def pause_writing(self) -> None:
        """Pass on that the sender reads too slowly."""
        self.inner.pause_writing()

    def resume_writing(self) -> None:
        """Pass on that it reads again."""
        self.inner.resume_writing()
