"""Where deliveries come from: the in-process queue here, other sources in a file of their own.

Receivers, which take webhooks in and put them into a sink, have files of their own too.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import attrs

from cloudinary_analyze.protocols import NotificationSource
from cloudinary_analyze.responses import Delivery


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
