"""One listener over the session's notification source: verifies, reads, and answers tasks.

Nothing that arrives can stop it: forged, stale, malformed and foreign deliveries are counted and
dropped. A source that breaks is resumed with backoff, and notifications of all pending tasks are
fetched again. A source that ends, or whose queue was shut down, fails what is pending.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import aclosing
from time import perf_counter
from typing import Final

import attrs

from cloudinary_analyze._clock import Clock, wake
from cloudinary_analyze._tasks.timers import SLICE
from cloudinary_analyze.config import Credentials
from cloudinary_analyze.errors import (
    InvalidSignatureError,
    MalformedNotificationError,
    NotificationError,
    NotificationSourceError,
    StaleNotificationError,
)
from cloudinary_analyze.events import Meter
from cloudinary_analyze.protocols import NotificationSource
from cloudinary_analyze.responses import Delivery, Notification
from cloudinary_analyze.webhooks import parse_notification, verify_delivery

logger = logging.getLogger("cloudinary_analyze")

FETCH_BATCH: Final = 500
REFETCH_INTERVAL: Final = 30.0
FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 30.0
ENDS: Final = getattr(asyncio, "QueueShutDown", ())  # since Python 3.13

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
        deliver: Applies a verified notification and returns the verdict.
        pending: The tasks to fetch notifications for after a break, by id.
        on_end: Takes the error when nothing can arrive any more.
    """

    source: NotificationSource
    credentials: Credentials
    clock: Clock
    meter: Meter
    deliver: Callable[[Notification, bytes], str] = attrs.field(kw_only=True)
    pending: Mapping[str, object] = attrs.field(kw_only=True)
    on_end: Callable[[NotificationSourceError], None] = attrs.field(kw_only=True)
    _tasks: list[asyncio.Task[None]] = attrs.field(factory=list, init=False)
    _to_fetch: OrderedDict[str, None] = attrs.field(factory=OrderedDict, init=False)
    _fetch_wanted: asyncio.Future[None] | None = attrs.field(default=None, init=False)

    def start(self) -> None:
        """Start listening."""
        self._tasks.append(asyncio.create_task(self._listen()))
        if has_memory(self.source):
            self._tasks.append(asyncio.create_task(self._fetch()))
            self._tasks.append(asyncio.create_task(self._refetch()))

    def ask_for(self, task_ids: Iterable[str]) -> None:
        """Fetch what was delivered for tasks earlier, where the source has a memory."""
        if len(self._tasks) > 1:
            self._to_fetch.update(dict.fromkeys(task_ids))
            if self._fetch_wanted is not None:
                wake(self._fetch_wanted)

    def stop(self) -> list[asyncio.Task[None]]:
        """Stop listening and return the asyncio tasks that are ending."""
        for task in self._tasks:
            task.cancel()
        return self._tasks

    async def _listen(self) -> None:
        pause = FIRST_PAUSE
        while True:
            try:
                async with aclosing(_Closing(self.source.listen())) as deliveries:
                    until = perf_counter() + SLICE
                    async for delivery in deliveries:
                        pause = FIRST_PAUSE
                        self.take(delivery)
                        if perf_counter() > until:
                            await asyncio.sleep(0)
                            until = perf_counter() + SLICE
            except (Exception, asyncio.CancelledError) as error:
                if _is_cancelled(error):
                    raise
                if isinstance(error, ENDS):
                    self._end(error)
                    return
                logger.warning(
                    "The notification source broke (%s: %s). Listening resumes in %.1f s.",
                    type(error).__name__,
                    error,
                    pause,
                )
                await self.clock.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
                self.ask_for(self.pending)
            else:
                self._end(None)
                return

    def _end(self, cause: BaseException | None) -> None:
        error = NotificationSourceError(
            "The notification source ended, so no result can arrive any more."
        )
        error.__cause__ = cause
        self.on_end(error)

    async def _fetch(self) -> None:
        pause = FIRST_PAUSE
        while True:
            if not self._to_fetch:
                self._fetch_wanted = asyncio.get_running_loop().create_future()
                await self._fetch_wanted
            count = min(FETCH_BATCH, len(self._to_fetch))
            batch = [self._to_fetch.popitem(last=False)[0] for _ in range(count)]
            try:
                deliveries = await self.source.fetch(batch)
                until = perf_counter() + SLICE
                for delivery in deliveries:
                    self.take(delivery)
                    if perf_counter() > until:
                        await asyncio.sleep(0)
                        until = perf_counter() + SLICE
            except (Exception, asyncio.CancelledError) as error:
                if _is_cancelled(error):
                    raise
                logger.warning(
                    "Earlier notifications could not be fetched (%s: %s). Retrying in %.1f s.",
                    type(error).__name__,
                    error,
                    pause,
                )
                self._to_fetch.update(dict.fromkeys(batch))
                await self.clock.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE)
            else:
                pause = FIRST_PAUSE

    async def _refetch(self) -> None:
        """Ask again for all that is pending, because a wake-up may get lost."""
        while True:
            await self.clock.sleep(REFETCH_INTERVAL)
            self.ask_for(self.pending)

    def take(self, delivery: Delivery) -> str:
        """Verify, parse and apply one delivery; return the verdict."""
        try:
            verify_delivery(delivery, self.credentials)
            notification = parse_notification(delivery.body)
            verdict = self.deliver(notification, delivery.body)
        except NotificationError as error:
            verdict = _VERDICTS[type(error)]
            self.meter.count(verdict)
            logger.info("A delivery was refused as %s: %s", verdict, error)
            return verdict
        except Exception as error:
            # A source may hand over anything; the listener must outlive it.
            self.meter.count("malformed")
            logger.warning("A delivery could not be read (%s).", type(error).__name__)
            return "malformed"
        self.meter.count(verdict, notification.task_id)
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
