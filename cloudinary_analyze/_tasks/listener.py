"""One listener over the session's notification source: verifies, reads, and answers tasks.

No delivery can stop it: forged, stale, malformed and foreign ones are counted and dropped. If the
source breaks, it is resumed with backoff, and the notifications of all pending tasks are fetched
again. If it ends, or its queue is shut down, pending tasks fail.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Final

import attrs

from cloudinary_analyze._clock import Clock, wake
from cloudinary_analyze._meter import Meter
from cloudinary_analyze._tasks.timers import SLICE
from cloudinary_analyze._values import NotPicklable
from cloudinary_analyze.config import Credentials
from cloudinary_analyze.errors import (
    InvalidSignatureError,
    MalformedNotificationError,
    NotificationError,
    NotificationSourceError,
    StaleNotificationError,
)
from cloudinary_analyze.notifications.reading import Retries, open_deliveries
from cloudinary_analyze.protocols import (
    TRACE_HEADER,
    AcknowledgingSource,
    NotificationSource,
    ReplayableSource,
)
from cloudinary_analyze.responses import Delivery, Notification
from cloudinary_analyze.webhooks import find_header, read_delivery

logger = logging.getLogger("cloudinary_analyze.tasks")

FETCH_BATCH: Final = 500
REFETCH_INTERVAL: Final = 30.0

_VERDICTS: Final[dict[type[NotificationError], str]] = {
    InvalidSignatureError: "forged",
    StaleNotificationError: "stale",
    MalformedNotificationError: "malformed",
}


@attrs.define(eq=False, repr=False)
class Listener(NotPicklable):
    """Reads the source for as long as the session is open.

    Attributes:
        deliver: Applies a verified notification and returns the verdict.
        pending: The tasks to fetch notifications for after a break, by id.
        on_end: Called with the error when nothing more can arrive.
    """

    source: NotificationSource
    credentials: Credentials
    clock: Clock
    meter: Meter
    deliver: Callable[[Notification, bytes], str] = attrs.field(kw_only=True)
    pending: Mapping[str, object] = attrs.field(kw_only=True)
    on_end: Callable[[NotificationSourceError], None] = attrs.field(kw_only=True)
    _acknowledge: Callable[[Delivery], None] | None = attrs.field(init=False)
    _tasks: list[asyncio.Task[None]] = attrs.field(factory=list, init=False)
    _to_fetch: OrderedDict[str, None] = attrs.field(factory=OrderedDict, init=False)
    # the pending tasks to fetch for, the next one last
    _round: list[str] = attrs.field(factory=list, init=False)
    _fetch_wanted: asyncio.Future[None] | None = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        source = self.source
        self._acknowledge = source.acknowledge if isinstance(source, AcknowledgingSource) else None

    def start(self) -> None:
        """Start listening."""
        self._tasks.append(asyncio.create_task(self._listen()))
        if isinstance(self.source, ReplayableSource):
            self._tasks.append(asyncio.create_task(self._fetch(self.source)))
            self._tasks.append(asyncio.create_task(self._refetch()))

    def ask_for(self, task_id: str) -> None:
        """Fetch earlier deliveries for a task, if the source keeps them."""
        if len(self._tasks) > 1:
            if len(self._to_fetch) > 2 * len(self.pending) + FETCH_BATCH:
                # bounds the ids that callers ask for while the source does not respond
                wanted = dict.fromkeys(filter(self.pending.__contains__, self._to_fetch))
                self._to_fetch = OrderedDict(wanted)
            self._to_fetch[task_id] = None
            self._wake_fetch()

    def _ask_for_all(self) -> None:
        """Fetch for all pending tasks. Copying 100,000 ids to a list is quick."""
        if len(self._tasks) > 1:
            self._round = list(self.pending)
            self._round.reverse()
            self._wake_fetch()

    def _wake_fetch(self) -> None:
        if self._fetch_wanted is not None:
            wake(self._fetch_wanted)

    def stop(self) -> list[asyncio.Task[None]]:
        """Stop listening and return the asyncio tasks that are ending."""
        for task in self._tasks:
            task.cancel()
        return self._tasks

    async def _listen(self) -> None:
        retries = Retries(self.clock)
        while True:
            try:
                async with open_deliveries(self.source) as deliveries:
                    until = perf_counter() + SLICE
                    async for delivery in deliveries:
                        retries.reset()
                        self.take(delivery)
                        if perf_counter() > until:
                            await asyncio.sleep(0)
                            until = perf_counter() + SLICE
            except (Exception, asyncio.CancelledError) as error:
                await retries.rest("The notification source broke", error)
                self._ask_for_all()
            else:
                self.on_end(
                    NotificationSourceError(
                        "The notification source ended, so no result can arrive any more."
                    )
                )
                return

    async def _fetch(self, source: ReplayableSource) -> None:
        retries = Retries(self.clock)
        while True:
            if not self._to_fetch and not self._round:
                self._fetch_wanted = asyncio.get_running_loop().create_future()
                await self._fetch_wanted
            batch = self._take_batch()
            if not batch:
                await asyncio.sleep(0)
                continue
            try:
                deliveries = await source.fetch(batch)
                until = perf_counter() + SLICE
                for delivery in deliveries:
                    self.take(delivery)
                    if perf_counter() > until:
                        await asyncio.sleep(0)
                        until = perf_counter() + SLICE
            except (Exception, asyncio.CancelledError) as error:
                self._to_fetch.update(dict.fromkeys(batch))
                await retries.rest("Earlier notifications could not be fetched", error)
            else:
                retries.reset()

    def _take_batch(self) -> list[str]:
        """Return the next ids to fetch for: first single requests, then all pending tasks."""
        count = min(FETCH_BATCH, len(self._to_fetch))
        ids = [self._to_fetch.popitem(last=False)[0] for _ in range(count)]
        rest = max(0, len(self._round) - (FETCH_BATCH - count))
        ids += reversed(self._round[rest:])
        del self._round[rest:]
        return [task_id for task_id in dict.fromkeys(ids) if task_id in self.pending]

    async def _refetch(self) -> None:
        """Fetch for all pending tasks again, because a wake-up may get lost."""
        while True:
            await self.clock.sleep(REFETCH_INTERVAL)
            if not self._round:
                self._ask_for_all()

    def take(self, delivery: Delivery) -> str:
        """Verify, parse and apply one delivery. Return the verdict."""
        try:
            notification = read_delivery(delivery, self.credentials)
            verdict = self.deliver(notification, delivery.body)
        except NotificationError as error:
            verdict = _VERDICTS[type(error)]
            self.meter.count(verdict)
            logger.info("A delivery was refused as %s: %s", verdict, error)
            return verdict
        except Exception as error:
            # A source may yield any object. The listener must survive it.
            self.meter.count("malformed")
            logger.warning("A delivery could not be read (%s).", type(error).__name__)
            return "malformed"
        if self.meter.hook is None:
            self.meter.count(verdict)
        else:
            received_at = delivery.received_at
            self.meter.count(
                verdict,
                notification.task_id,
                queued=None if received_at is None else max(0.0, self.clock.wall() - received_at),
                trace=find_header(delivery.headers, TRACE_HEADER),
            )
        if self._acknowledge is not None and verdict in {"resolved", "duplicate"}:
            try:
                self._acknowledge(delivery)
            except Exception:
                logger.exception("The notification source failed to acknowledge a delivery.")
        return verdict
