"""The receiver for aiohttp.web.

Route its `WebhookReceiver.handle`:

```python
receiver = WebhookReceiver(sink, credentials)
app.router.add_post("/hooks/cloudinary", receiver.handle)
```
"""

from __future__ import annotations

from aiohttp import web

from cloudinary_analyze._clock import SYSTEM_CLOCK, Clock
from cloudinary_analyze._values import NotPicklable
from cloudinary_analyze.config import Credentials
from cloudinary_analyze.notifications.receiver import (
    BODY_SECONDS,
    CUT_SHORT,
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


class WebhookReceiver(NotPicklable):
    """Receives Cloudinary's webhooks and puts them into a sink.

    Responds as `cloudinary_analyze.notifications.asgi.WebhookReceiver` does.

    Source: the webhook.

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

    async def handle(self, request: web.Request) -> web.Response:
        """Respond to one request.

        Cancelling is safe: the delivery is stored or not, and its sender tries again.

        Args:
            request: The request. A method other than POST gets 405.
        """
        try:
            if request.method != "POST":
                raise RefusedError(WRONG_METHOD.status, WRONG_METHOD.text)
            headers = read_headers(request.headers.items())
            body = await self._read_body(request)
        except RefusedError as refused:
            response = _build_response(refused.reply)
            response.force_close()  # a refused body is not waited for
            return response
        return _build_response(await self._intake.take(body, headers))

    async def _read_body(self, request: web.Request) -> bytes:
        clock = self._intake.clock
        body = bytearray()
        try:
            async with clock.timeout_at(clock.monotonic() + BODY_SECONDS):
                async for chunk in request.content.iter_any():
                    body += chunk
                    if len(body) > MAX_BODY:
                        raise RefusedError(TOO_LONG.status, TOO_LONG.text)
        except TimeoutError:
            raise RefusedError(TOO_SLOW.status, TOO_SLOW.text) from None
        except (ConnectionError, web.RequestPayloadError):
            raise RefusedError(CUT_SHORT.status, CUT_SHORT.text) from None
        return bytes(body)


def _build_response(reply: Reply) -> web.Response:
    headers = {"Allow": "POST"} if reply.status == WRONG_METHOD.status else None
    return web.Response(status=reply.status, text=reply.text, headers=headers)
