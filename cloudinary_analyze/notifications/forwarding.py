"""Leads any source into any sink, so that one process can take in what many wait for."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator
from typing import Final

from cloudinary_analyze._clock import SYSTEM_CLOCK, Clock
from cloudinary_analyze.config import Credentials
from cloudinary_analyze.errors import NotificationError
from cloudinary_analyze.notifications.receiver import check_secrets, read_answer
from cloudinary_analyze.protocols import NotificationSink, NotificationSource
from cloudinary_analyze.responses import Delivery

logger = logging.getLogger("cloudinary_analyze")

FIRST_PAUSE: Final = 0.5
LONGEST_PAUSE: Final = 30.0


async def forward(
    source: NotificationSource,
    sink: NotificationSink,
    credentials: Credentials,
    *,
    clock: Clock = SYSTEM_CLOCK,
) -> None:
    """Lead a source into a sink, until the source ends: one process receives for many.

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
