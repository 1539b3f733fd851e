'''Where deliveries come from and go to: the in-process queue here, the others in files of their own.

Receivers (`asgi`, `aiohttp`) take webhooks in and put them into a sink; a session reads a source.
`redis` is both, `pull` is a source, and `forward` leads any source into any sink.

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
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Final

import attrs

from cloudinary_analyze._clock import SYSTEM_CLOCK, Clock
from cloudinary_analyze.config import Credentials
from cloudinary_analyze.errors import NotificationError
from cloudinary_analyze.notifications.receiver import check_secrets, read_answer
from cloudinary_analyze.protocols import NotificationSink, NotificationSource
from cloudinary_analyze.responses import Delivery

logger = logging.getLogger("cloudinary_analyze")

FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 30.0


@attrs.define(eq=False)
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


async def forward(
    source: NotificationSource,
    sink: NotificationSink,
    credentials: Credentials,
    *,
    clock: Clock = SYSTEM_CLOCK,
) -> None:
    """Lead a source into a sink, until the source ends: one process pulls, all others are fed.

    Each answer to an analysis task is verified, stored, and only then settled with the source.
    What is forged, malformed or no such answer is left with the source. A source that breaks is
    taken up again with growing pauses, and a delivery that the sink does not take is put again.
    Cancelling is the way to stop it, and is safe.

    Args:
        source: Where deliveries come from. No session may read it meanwhile.
        sink: Where they go.
        credentials: Whose notifications are let through.
        clock: For tests.

    Raises:
        ConfigurationError: The credentials hold no secret to verify with.
    """
    check_secrets(credentials)
    pause = FIRST_PAUSE
    while True:
        try:
            deliveries = source.listen()
            try:
                async for delivery in deliveries:
                    pause = FIRST_PAUSE
                    if _is_answer(delivery, credentials):
                        await _put(delivery, sink, clock)
                        source.settle(delivery)
            finally:
                if isinstance(deliveries, AsyncGenerator):
                    await deliveries.aclose()
        except Exception as error:
            logger.warning(
                "The notification source broke (%s: %s); listening again in %.1f s.",
                type(error).__name__,
                error,
                pause,
            )
            await clock.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        else:
            return


def _is_answer(delivery: Delivery, credentials: Credentials) -> bool:
    try:
        answer = read_answer(delivery, credentials)
    except NotificationError as error:
        logger.info("A delivery was not forwarded: %s", error)
        return False
    return answer is not None


async def _put(delivery: Delivery, sink: NotificationSink, clock: Clock) -> None:
    pause = FIRST_PAUSE
    while True:
        try:
            await sink.put(delivery)
        except Exception as error:
            logger.warning(
                "A delivery could not be stored (%s: %s); again in %.1f s.",
                type(error).__name__,
                error,
                pause,
            )
            await clock.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
        else:
            return
