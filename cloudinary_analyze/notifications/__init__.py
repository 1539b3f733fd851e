'''Sources and sinks of deliveries: the in-process queue here, others in separate modules.

Receivers (`asgi`, `aiohttp`) accept webhooks and put them into a sink; a session reads a source.
`redis` is both, and `forwarding` copies from any source to any sink.

.. include:: ../docs/workers.md

# Another broker

Any class with the methods of `cloudinary_analyze.protocols` adds another broker. For example,
NATS JetStream with a stream named ``analyses`` that stores the subjects ``analyses.*`` is both
sink and source, and returns earlier deliveries:

```python
from collections.abc import AsyncIterator, Sequence

from nats.js import JetStreamContext
from nats.js.api import DeliverPolicy
from nats.js.errors import NotFoundError

from cloudinary_analyze import Delivery, parse_notification
from cloudinary_analyze.notifications import decode_delivery, encode_delivery


class NatsNotifications:
    """Every process sees every delivery, and fetches earlier ones."""

    def __init__(self, jetstream: JetStreamContext) -> None:
        self.jetstream = jetstream  # await nats.connect(…), then .jetstream()

    async def put(self, delivery: Delivery, /) -> None:
        task_id = parse_notification(delivery.body).task_id
        await self.jetstream.publish(f"analyses.{task_id}", encode_delivery(delivery))

    async def listen(self) -> AsyncIterator[Delivery]:
        subscription = await self.jetstream.subscribe(
            "analyses.*", ordered_consumer=True, deliver_policy=DeliverPolicy.NEW
        )
        async for message in subscription.messages:
            yield decode_delivery(message.data)

    async def fetch(self, task_ids: Sequence[str]) -> Sequence[Delivery]:
        found: list[Delivery] = []
        for task_id in task_ids:
            try:
                message = await self.jetstream.get_last_msg("analyses", f"analyses.{task_id}")
            except NotFoundError:
                continue
            if message.data is not None:
                found.append(decode_delivery(message.data))
        return found
```

`NotificationSink.put` returns once the broker has stored the delivery, because the receiver then
answers 200. `encode_delivery` keeps what a session needs: the body byte for byte, the signature's
headers, and ``received_at``.
'''

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import attrs

from cloudinary_analyze._values import NotPicklable
from cloudinary_analyze.responses import Delivery
from cloudinary_analyze.webhooks import SIGNATURE_HEADERS, find_header

__all__ = ["decode_delivery", "encode_delivery"]


@attrs.define(eq=False, repr=False)
class QueueSource(NotPicklable):
    """An ``asyncio.Queue[Delivery]`` as a source. A session wraps a queue that you pass in it.

    Attributes:
        queue: Filled by a receiver in this process. One session reads it.
    """

    queue: asyncio.Queue[Delivery]

    async def listen(self) -> AsyncIterator[Delivery]:
        """Yield what the queue holds. Shutting it down (Python 3.13) is the end of the source."""
        while True:
            yield await self.queue.get()
            while not self.queue.empty():
                yield self.queue.get_nowait()


def encode_delivery(delivery: Delivery) -> bytes:
    """Return the stored form of a delivery: a line of JSON, then the body byte for byte."""
    headers = {
        name: value
        for name in SIGNATURE_HEADERS
        if (value := find_header(delivery.headers, name)) is not None
    }
    head = {"received_at": delivery.received_at, "headers": headers}
    return json.dumps(head).encode() + b"\n" + delivery.body


def decode_delivery(stored: bytes) -> Delivery:
    """Return a stored delivery, with the time of its first receipt.

    Raises:
        ValueError: The value is not a stored delivery.
    """
    line, newline, body = stored.partition(b"\n")
    try:
        head = json.loads(line)
        headers, received_at = head["headers"], head["received_at"]
    except (ValueError, TypeError, LookupError, RecursionError):
        raise ValueError("Not a stored delivery.") from None
    texts = (*headers, *headers.values()) if type(headers) is dict else (None,)
    if not (
        newline
        and all(type(text) is str for text in texts)
        and (received_at is None or type(received_at) in (int, float))
    ):
        raise ValueError("Not a stored delivery.")
    return Delivery(body, headers, received_at=received_at)
