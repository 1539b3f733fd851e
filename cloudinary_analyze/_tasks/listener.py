"""One listener over the session's notification source: verifies, reads, and answers tasks.

Nothing that arrives can stop it: what is forged, stale, malformed or foreign is counted and left.
A source that breaks is taken up again with backoff, and all that is pending is fetched.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from typing import Final

import attrs

from cloudinary_analyze._clock import Clock, wake
from cloudinary_analyze._tasks.table import Table
from cloudinary_analyze.config import Credentials
from cloudinary_analyze.errors import (
    InvalidSignatureError,
    MalformedNotificationError,
    NotificationError,
    NotificationSourceError,
    StaleNotificationError,
)
from cloudinary_analyze.protocols import NotificationSource
from cloudinary_analyze.responses import Delivery
from cloudinary_analyze.webhooks import parse_notification, verify_delivery

logger = logging.getLogger("cloudinary_analyze")

BURST: Final = 32  # deliveries between two yields to the loop
FETCH_BATCH: Final = 500
REFETCH_INTERVAL: Final = 30.0
FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 30.0

_VERDICTS: Final[dict[type[NotificationError], str]] = {
    InvalidSignatureError: "forged",
    StaleNotificationError: "stale",
    MalformedNotificationError: "malformed",
}


def has_memory(source: NotificationSource) -> bool:
    """Whether a source can be asked for what was delivered earlier."""
    fetch = getattr(type(source), "fetch", None)
    return fetch is not None and fetch is not NotificationSource.fetch


@attrs.define(eq=False, repr=False)
class Listener:
    """Reads the source for as long as the session is open.

    Attributes:
        on_end: Is told when nothing will come any more.
    """

    source: NotificationSource
    credentials: Credentials
    table: Table
    clock: Clock
    on_end: Callable[[NotificationSourceError], None]
    _tasks: list[asyncio.Task[None]] = attrs.field(factory=list)
    _to_fetch: dict[str, None] = attrs.field(factory=dict)
    _fetch_wanted: asyncio.Future[None] | None = None

    def start(self) -> None:
        """Begin to listen."""
        self._tasks.append(asyncio.create_task(self._listen()))
        if has_memory(self.source):
            self._tasks.append(asyncio.create_task(self._fetch()))
            self._tasks.append(asyncio.create_task(self._refetch()))

    def ask_for(self, task_ids: Sequence[str]) -> None:
        """Fetch what was delivered for tasks earlier, where the source has a memory."""
        if len(self._tasks) > 1:
            self._to_fetch.update(dict.fromkeys(task_ids))
            if self._fetch_wanted is not None:
                wake(self._fetch_wanted)

    def stop(self) -> list[asyncio.Task[None]]:
        """End the listening; return what is ending."""
        for task in self._tasks:
            task.cancel()
        return self._tasks

    async def _listen(self) -> None:
        pause = FIRST_PAUSE
        while True:
            try:
                async with aclosing(_Closing(self.source.listen())) as deliveries:
                    taken = 0
                    async for delivery in deliveries:
                        pause = FIRST_PAUSE
                        self.take(delivery)
                        taken += 1
                        if taken % BURST == 0:
                            await asyncio.sleep(0)
            except (Exception, asyncio.CancelledError) as error:
                if _is_cancelled(error):
                    raise
                logger.warning(
                    "The notification source broke (%s: %s); listening again in %.1f s.",
                    type(error).__name__,
                    error,
                    pause,
                )
                await self.clock.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                self.ask_for(list(self.table.pending))
            else:
                self.on_end(
                    NotificationSourceError(
                        "The notification source ended, so no result can arrive any more."
                    )
                )
                return

    async def _fetch(self) -> None:
        pause = FIRST_PAUSE
        while True:
            if not self._to_fetch:
                self._fetch_wanted = asyncio.get_running_loop().create_future()
                await self._fetch_wanted
            batch = [key for key, _ in zip(self._to_fetch, range(FETCH_BATCH), strict=False)]
            for task_id in batch:
                del self._to_fetch[task_id]
            try:
                deliveries = await self.source.fetch(batch)
            except (Exception, asyncio.CancelledError) as error:
                if _is_cancelled(error):
                    raise
                logger.warning(
                    "Earlier notifications could not be fetched (%s: %s); again in %.1f s.",
                    type(error).__name__,
                    error,
                    pause,
                )
                self._to_fetch.update(dict.fromkeys(batch))
                await self.clock.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                continue
            pause = FIRST_PAUSE
            for taken, delivery in enumerate(deliveries, start=1):
                self.take(delivery)
                if taken % BURST == 0:
                    await asyncio.sleep(0)

    async def _refetch(self) -> None:
        """Ask again for all that is pending, since a wake-up may get lost on its way."""
        while True:
            await self.clock.sleep(REFETCH_INTERVAL)
            self.ask_for(list(self.table.pending))

    def take(self, delivery: Delivery) -> str:
        """Verify, read and apply one delivery; return the verdict."""
        try:
            verify_delivery(delivery, self.credentials)
            notification = parse_notification(delivery.body)
            verdict = self.table.deliver(notification, delivery.body)
        except NotificationError as error:
            verdict = _VERDICTS[type(error)]
            self.table.count(verdict)
            logger.info("A delivery was refused as %s: %s", verdict, error)
            return verdict
        except Exception as error:
            # a source may hand over anything; the listener must outlive it
            self.table.count("malformed")
            logger.warning("A delivery could not be read (%s).", type(error).__name__)
            return "malformed"
        if verdict in {"resolved", "duplicate"}:
            try:
                self.source.settle(delivery)
            except Exception:
                logger.exception("The notification source failed to settle a delivery.")
        return verdict


def _is_cancelled(error: BaseException) -> bool:
    """Whether it is we who are cancelled, not something inside of the source."""
    task = asyncio.current_task()
    return isinstance(error, asyncio.CancelledError) and (task is None or task.cancelling() > 0)


class _Closing:
    """Any async iterator, with an ``aclose`` even where it has none."""

    def __init__(self, iterator: AsyncIterator[Delivery]) -> None:
        self._iterator = iterator

    def __aiter__(self) -> AsyncIterator[Delivery]:
        return self._iterator

    async def aclose(self) -> None:
        close = getattr(self._iterator, "aclose", None)
        if close is not None:
            await close()
