"""The receiver for ASGI: FastAPI, Starlette, or an application without a framework.

Give it a separate route, so that the exact URL responds:

```python
receiver = WebhookReceiver(sink, credentials)
app = FastAPI(routes=[Route("/hooks/cloudinary", endpoint=receiver)])
```

``Route`` is Starlette's; ``app.add_route("/hooks/cloudinary", receiver)`` does the same. Do not
use ``app.mount``: it answers the bare path with a redirect, which the sender does not follow.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final

from cloudinary_analyze._clock import SYSTEM_CLOCK, Clock
from cloudinary_analyze._values import NotPicklable
from cloudinary_analyze.config import Credentials
from cloudinary_analyze.notifications.receiver import (
    BODY_SECONDS,
    MAX_BODY,
    TOO_LONG,
    TOO_SLOW,
    WRONG_METHOD,
    Intake,
    RefusedError,
    Reply,
    read_headers,
)
from cloudinary_analyze.protocols import NotificationSink

__all__ = ["WebhookReceiver"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_GONE: Final = "http.disconnect"


class WebhookReceiver(NotPicklable):
    """An ASGI application that receives Cloudinary's webhooks and puts them into a sink.

    Responds 200 only once a delivery is stored. Responds 401 if it is not signed with the
    credentials' notification secret, 400 if it is malformed, 413 if it is longer than 1 MiB, and
    408 if it takes longer than 10 s to arrive. If the sink fails or takes longer than 20 s, the
    sender gets 503 and tries again. A signed notification that names no task gets 200 and is
    dropped.

    Args:
        sink: Where verified deliveries go: an ``asyncio.Queue[Delivery]`` that the session of this
            process reads, or a `NotificationSink` such as `RedisNotifications`.
        credentials: The credentials whose notifications are accepted.
        clock: Stamps deliveries, and bounds the waits; for tests.

    Raises:
        ConfigurationError: The credentials hold no secret to verify with.
    """

    def __init__(
        self, sink: NotificationSink, credentials: Credentials, *, clock: Clock = SYSTEM_CLOCK
    ) -> None:
        self._intake = Intake(sink, credentials, clock=clock)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one ASGI scope: a request, or the lifespan if this is the whole application."""
        if scope["type"] == "lifespan":
            await _serve_lifespan(receive, send)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1003})
        else:
            await self._serve(scope, receive, send)

    async def _serve(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        whole = False
        try:
            if scope["method"] != "POST":
                raise RefusedError(WRONG_METHOD.status, WRONG_METHOD.text)
            headers = read_headers(
                (name.decode("latin-1"), value.decode("latin-1"))
                for name, value in scope["headers"]
            )
            body = await self._read_body(receive)
            whole = True
            if body is None:
                return
            reply = await self._intake.take(body, headers)
        except RefusedError as refused:
            reply = refused.reply
        # the rest of a refused body is not read, so the connection must not be used again
        close = not whole and scope.get("http_version", "1.1").startswith("1")
        with contextlib.suppress(OSError):  # the sender has disconnected; the delivery is stored
            await _send_reply(send, reply, close=close)

    async def _read_body(self, receive: Receive) -> bytes | None:
        """Return the body, or ``None`` if the sender has disconnected."""
        clock = self._intake.clock
        body = bytearray()
        try:
            async with clock.timeout_at(clock.monotonic() + BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == _GONE:
                        return None
                    body += message.get("body", b"")
                    if len(body) > MAX_BODY:
                        raise RefusedError(TOO_LONG.status, TOO_LONG.text)
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            raise RefusedError(TOO_SLOW.status, TOO_SLOW.text) from None


async def _send_reply(send: Send, reply: Reply, *, close: bool) -> None:
    body = reply.text.encode()
    headers = [
        (b"content-type", b"text/plain; charset=utf-8"),
        (b"content-length", str(len(body)).encode()),
    ]
    if reply.status == WRONG_METHOD.status:
        headers.append((b"allow", b"POST"))
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": reply.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _serve_lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return
