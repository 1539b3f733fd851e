"""Copies deliveries from a source to a sink, so that one process can receive for many."""

from __future__ import annotations

import asyncio
import logging

from cloudinary_analyze._clock import SYSTEM_CLOCK, Clock
from cloudinary_analyze.config import Credentials
from cloudinary_analyze.errors import NotificationError
from cloudinary_analyze.notifications.reading import Retries, claim_source, open_deliveries
from cloudinary_analyze.notifications.receiver import check_secrets
from cloudinary_analyze.protocols import AcknowledgingSource, NotificationSink, NotificationSource
from cloudinary_analyze.responses import Delivery
from cloudinary_analyze.webhooks import VerifiedDelivery, parse_delivery, seal_delivery

__all__ = ["forward"]

logger: logging.Logger = logging.getLogger("cloudinary_analyze.notifications")


async def forward(
    source: NotificationSource,
    sink: NotificationSink,
    credentials: Credentials,
    *,
    clock: Clock = SYSTEM_CLOCK,
) -> None:
    """Copy deliveries from a source to a sink, until the source ends.

    Each notification that names a task is verified, stored, and only then acknowledged to the
    source. Forged and malformed deliveries, and those that name no task, are left with the source.
    A source that breaks is read again after growing pauses, and a delivery that the sink refuses is
    put again. Cancel it to stop it. Cancelling is safe.

    Args:
        source: Where deliveries come from. No session may read it meanwhile.
        sink: Where deliveries go.
        credentials: The credentials whose notifications are forwarded.
        clock: For tests.

    Raises:
        ConfigurationError: The credentials hold no secret to verify with, or the source has
            another reader.
    """
    check_secrets(credentials)
    claim = claim_source(source)
    try:
        await _forward(source, sink, credentials, clock)
    finally:
        claim.release()


async def _forward(
    source: NotificationSource, sink: NotificationSink, credentials: Credentials, clock: Clock
) -> None:
    acknowledge = source.acknowledge if isinstance(source, AcknowledgingSource) else None
    retries = Retries(clock)
    while True:
        try:
            async with open_deliveries(source) as deliveries:
                async for delivery in deliveries:
                    retries.reset()
                    verified = _verify(delivery, credentials)
                    if verified is None:
                        continue
                    await _put(verified, sink, clock)
                    if acknowledge is not None:
                        acknowledge(delivery)
        except (Exception, asyncio.CancelledError) as error:
            await retries.rest("The notification source broke", error)
        else:
            return


def _verify(delivery: Delivery, credentials: Credentials) -> VerifiedDelivery | None:
    try:
        verified = seal_delivery(delivery, credentials)
    except NotificationError as error:
        logger.info("A delivery was not forwarded: %s", error)
        return None
    return None if parse_delivery(verified).task_id is None else verified


async def _put(delivery: Delivery, sink: NotificationSink, clock: Clock) -> None:
    retries = Retries(clock)
    while True:
        try:
            await sink.put(delivery)
        except (Exception, asyncio.CancelledError) as error:
            await retries.rest("A delivery could not be stored", error)
        else:
            return
