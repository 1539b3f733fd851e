'''Where deliveries come from and go to: the in-process queue here, the others in files of their own.

Receivers (`asgi`, `aiohttp`) take webhooks in and put them into a sink; a session reads a source.
`redis` is both, and `forwarding` leads any source into any sink.

Another broker takes a file. NATS JetStream, say, with a stream named ``analyses`` that stores the
subjects ``analyses.*``, is both sink and source, and has a memory::

    import json

    from nats.js.api import DeliverPolicy
    from nats.js.errors import NotFoundError

    from cloudinary_analyze import Delivery, parse_notification
    from cloudinary_analyze.protocols import NotificationSink, NotificationSource


    class NatsNotifications(NotificationSource, NotificationSink):
        """Every process sees every delivery, and looks up those that came earlier."""

        def __init__(self, jetstream):
            self.jetstream = jetstream  # await nats.connect(…), then .jetstream()

        async def put(self, delivery, /):
            task_id = parse_notification(delivery.body).task_id
            headers = {**delivery.headers, "Received-At": json.dumps(delivery.received_at)}
            await self.jetstream.publish(f"analyses.{task_id}", delivery.body, headers=headers)

        async def listen(self):
            subscription = await self.jetstream.subscribe(
                "analyses.*", ordered_consumer=True, deliver_policy=DeliverPolicy.NEW
            )
            async for message in subscription.messages:
                yield read_delivery(message)

        async def fetch(self, task_ids):
            found = []
            for task_id in task_ids:
                try:
                    message = await self.jetstream.get_last_msg("analyses", f"analyses.{task_id}")
                except NotFoundError:
                    continue
                found.append(read_delivery(message))
            return found


    def read_delivery(message):
        received_at = json.loads(message.headers["Received-At"])
        return Delivery(message.data, message.headers, received_at=received_at)

`NotificationSink.put` returns once the broker has stored the delivery, since the sender is told
200 then. What it stores is the body byte for byte, the headers, and ``received_at``.
'''

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import attrs

from cloudinary_analyze.protocols import NotificationSource
from cloudinary_analyze.responses import Delivery


@attrs.define(eq=False, repr=False)
class QueueSource(NotificationSource):
    """A plain ``asyncio.Queue[Delivery]`` as a source; sessions wrap the queue they are given.

    Attributes:
        queue: Filled by a receiver in this process. One session reads it; two would steal
            deliveries from each other.
    """

    queue: asyncio.Queue[Delivery]

    async def listen(self) -> AsyncIterator[Delivery]:
        """Yield what the queue holds, for ever."""
        while True:
            yield await self.queue.get()
            while not self.queue.empty():
                yield self.queue.get_nowait()
