"""The decisions of both receivers: which webhooks are accepted, and the responses to them.

The decisions are pure. Only the sink is awaited.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Iterable, Mapping
from typing import Final

import attrs

from cloudinary_analyze._cancellation import count_cancellations, is_own_cancellation
from cloudinary_analyze._clock import SYSTEM_CLOCK, Clock
from cloudinary_analyze._values import NotPicklable
from cloudinary_analyze.config import Credentials
from cloudinary_analyze.errors import (
    ConfigurationError,
    MalformedNotificationError,
    NotificationError,
    describe,
    shorten,
)
from cloudinary_analyze.protocols import NotificationSink
from cloudinary_analyze.responses import Delivery
from cloudinary_analyze.webhooks import (
    SIGNATURE_HEADER,
    SIGNATURE_HEADERS,
    SIGNATURE_V2_HEADER,
    TIMESTAMP_HEADER,
    is_timestamp,
    parse_delivery,
    seal_delivery,
)

logger: logging.Logger = logging.getLogger("cloudinary_analyze.notifications")

MAX_BODY: Final = 2**20  # bytes
BODY_SECONDS: Final = 10.0
SINK_SECONDS: Final = 20.0  # a limit for sinks that have none

_KEPT: Final = {name.lower(): name for name in SIGNATURE_HEADERS}
_LENGTH: Final = re.compile(r"[0-9]{1,20}")
_SIGNATURE: Final = re.compile(r"[0-9A-Fa-f]{40}|[0-9A-Fa-f]{64}")


@attrs.frozen
class Reply:
    """The response to the sender.

    Attributes:
        status: The HTTP status. If it is not 200, the service tries again.
        text: A sentence for the person who investigates.
    """

    status: int
    text: str


class RefusedError(Exception):
    """A webhook that is refused, with the reply to its sender."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.reply: Reply = Reply(status, text)


TOO_LONG: Final = Reply(413, f"A notification has {MAX_BODY} bytes at most.")
TOO_SLOW: Final = Reply(408, f"The body did not arrive within {BODY_SECONDS:.0f} s.")
CUT_SHORT: Final = Reply(400, "The body did not arrive whole.")
WRONG_METHOD: Final = Reply(405, "Notifications are sent with POST.")
STORED: Final = Reply(200, "Stored.")
DROPPED: Final = Reply(200, "Names no analysis task; dropped.")
UNREADABLE: Final = Reply(400, "The body is signed, but no JSON object.")
NOT_STORED: Final = Reply(503, "The notification could not be stored now; send it again.")


def read_headers(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Return the signature's headers, before the body is read. All other headers are discarded.

    Raises:
        RefusedError: A verifiable signature is missing, or the body is too long.
    """
    headers: dict[str, str] = {}
    for name, value in pairs:
        folded = name.lower()
        if folded == "content-length":
            if not _LENGTH.fullmatch(value):
                raise RefusedError(400, "The Content-Length header must be a number of bytes.")
            if int(value) > MAX_BODY:
                raise RefusedError(TOO_LONG.status, TOO_LONG.text)
        if folded in _KEPT:
            if _KEPT[folded] in headers:
                raise RefusedError(400, f"There is more than one {_KEPT[folded]} header.")
            headers[_KEPT[folded]] = value
    _check_headers(headers)
    return headers


def _check_headers(headers: Mapping[str, str]) -> None:
    signature = headers.get(SIGNATURE_HEADER)
    if signature is None and SIGNATURE_V2_HEADER in headers:
        logger.warning(
            "A notification was refused: it has a v2 signature only, which only the vendor "
            "can verify. Set the trigger's auth_scheme to 'default' or 'legacy_hmac'."
        )
        raise RefusedError(401, "A v2 signature alone cannot be verified here; see auth_scheme.")
    if signature is None:
        raise RefusedError(401, f"Missing {SIGNATURE_HEADER} header.")
    if not _SIGNATURE.fullmatch(signature):
        raise RefusedError(
            400, f"The {SIGNATURE_HEADER} header must be a SHA-1 or SHA-256 digest in hex."
        )
    if not is_timestamp(headers.get(TIMESTAMP_HEADER, "")):
        raise RefusedError(400, f"The {TIMESTAMP_HEADER} header must be Unix seconds.")


def check_secrets(credentials: Credentials) -> None:
    """Raise if notifications cannot be verified with some credentials.

    Raises:
        ConfigurationError: They contain no secret.
    """
    if not credentials.signing_secrets:
        raise ConfigurationError(
            "Notifications cannot be verified without a secret. Pass "
            "Credentials(…, notification_secrets=…) beside the OAuth token."
        )


@attrs.define(eq=False)
class Intake(NotPicklable):
    """Verifies and stores webhooks, for any web framework.

    A signed webhook that names a task is stored, whatever its shape. The session that awaits the
    task interprets it.

    Attributes:
        sink: Where verified deliveries go.
        credentials: The credentials whose notifications are accepted.
        clock: Stamps deliveries, and bounds the waits.
    """

    sink: NotificationSink
    credentials: Credentials
    clock: Clock = attrs.field(default=SYSTEM_CLOCK, kw_only=True)

    def __attrs_post_init__(self) -> None:
        check_secrets(self.credentials)

    async def take(self, body: bytes, headers: Mapping[str, str]) -> Reply:
        """Verify and store one webhook. Return the response to its sender.

        Cancelling is safe: the delivery is stored or not, and its sender tries again.
        """
        received = Delivery(body, headers, received_at=self.clock.wall())
        try:
            delivery = seal_delivery(received, self.credentials)
        except MalformedNotificationError as error:
            logger.info("A notification was refused: %s", error)
            return UNREADABLE
        except NotificationError as error:
            logger.info("A notification was refused: %s", error)
            return Reply(401, str(error))
        task_id = parse_delivery(delivery).task_id
        if task_id is None:
            return DROPPED
        before = count_cancellations()
        try:
            async with self.clock.timeout_at(self.clock.monotonic() + SINK_SECONDS):
                await self.sink.put(delivery)
        except (Exception, asyncio.CancelledError) as error:
            if is_own_cancellation(error, before):
                raise
            # with any status but 200, the sender tries again
            logger.warning(
                "The notification of the task %s could not be stored (%s). The "
                "receiver answers 503, and the sender tries again.",
                shorten(task_id),
                describe(error),
            )
            return NOT_STORED
        return STORED
