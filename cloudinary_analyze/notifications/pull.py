"""Cloudinary's hosted pull queue as a source, for machines that no webhook reaches. Experimental.

The vendor documents polled notifications for notification triggers whose URL is
``poll://<channel>``. That the results of analyses are routed there is **unverified**: try it with
your account before you rely on it. Where they are, no public address is needed.

A message that was fetched is hidden for a while and comes again unless it is acknowledged, and
only what resolved a task here, or was stored, is acknowledged. So what belongs to others is left
to them, and a channel of its own spares everybody the detour. With several processes let one
alone pull, and feed the rest: ``forwarding.forward(PolledNotifications(…), RedisNotifications(…), …)``.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterator
from typing import Any, Final
from urllib.parse import quote, urlencode

import attrs
from yarl import URL

from cloudinary_analyze._clock import SYSTEM_CLOCK, Clock, wake
from cloudinary_analyze._http.transport import Transport
from cloudinary_analyze._version import __version__
from cloudinary_analyze._wire.protocol import read_error, read_object
from cloudinary_analyze._wire.signature import SIGNATURE_HEADER, TIMESTAMP_HEADER
from cloudinary_analyze.config import DEFAULT_HOST, Credentials, Settings, read_base_url
from cloudinary_analyze.errors import AnalyzeError, ConfigurationError
from cloudinary_analyze.protocols import NotificationSource
from cloudinary_analyze.responses import Delivery

logger = logging.getLogger("cloudinary_analyze")

MESSAGES: Final = 100  # the most that one request may ask for, or acknowledge
WAIT_SECONDS: Final = 20
LEAST_READ_TIMEOUT: Final = 2.0 * WAIT_SECONDS
EMPTY_PAUSE: Final = 1.0  # for a server that does not wait
ACKNOWLEDGE_SECONDS: Final = 0.2  # how long acknowledgements gather
PARTING_SECONDS: Final = 2.0


@attrs.frozen
class PulledDelivery(Delivery):
    """A delivery from the pull queue, with what acknowledges it."""

    receipt_handle: str = attrs.field(kw_only=True, repr=False)


def read_message(message: Any) -> PulledDelivery:
    """Return one message of the pull queue as a delivery. Its age is unknown.

    Raises:
        ValueError: It is no such message.
    """
    fields = message if isinstance(message, dict) else {}
    payload, handle = fields.get("signed_payload"), fields.get("receipt_handle")
    if type(payload) is not str or type(handle) is not str:
        raise ValueError("It has no signed_payload, or no receipt_handle.")
    payload = payload.rstrip("=")
    try:
        body = base64.b64decode(payload + "=" * (-len(payload) % 4), b"-_", validate=True)
    except ValueError as error:
        raise ValueError("Its signed_payload is no base64.") from error
    headers = {
        SIGNATURE_HEADER: str(fields.get("signature", "")),
        TIMESTAMP_HEADER: str(fields.get("timestamp", "")),
    }
    return PulledDelivery(body, headers, received_at=None, receipt_handle=handle)


def _check_channel(_source: Any, _attribute: Any, channel: Any) -> None:
    if not isinstance(channel, str) or not channel or "/" in channel:
        raise ConfigurationError(
            f"The channel is the name behind poll:// of the trigger's URL, not {channel!r}."
        )


def _check_seconds(_source: Any, _attribute: Any, seconds: Any) -> None:
    if isinstance(seconds, bool) or not isinstance(seconds, int) or not 1 <= seconds <= 600:
        raise ConfigurationError(
            f"visibility_timeout must be whole seconds from 1 to 600, not {seconds!r}."
        )


@attrs.define(eq=False)
class PolledNotifications(NotificationSource):
    """The hosted pull queue of an account, long-polled. Experimental: see the module.

    Implements ``GET /v2/notifications/{cloud}/messages`` and ``POST …/messages/ack``.

    Attributes:
        channel: The name behind ``poll://`` of the trigger's URL.
        credentials: Whose queue it is. Default: the environment's.
        settings: For the host and the timeouts of an attempt. Default: `Settings()`.
        visibility_timeout: Seconds, 1 to 600, that a fetched message is hidden from everybody.
        clock: For tests.

    Raises:
        ConfigurationError: A value cannot be right.
    """

    channel: str = attrs.field(validator=_check_channel)
    credentials: Credentials = attrs.field(factory=Credentials.from_environment, kw_only=True)
    settings: Settings = attrs.field(factory=Settings, kw_only=True)
    visibility_timeout: int = attrs.field(default=30, kw_only=True, validator=_check_seconds)
    clock: Clock = attrs.field(default=SYSTEM_CLOCK, kw_only=True, repr=False)
    _base: str = attrs.field(init=False, repr=False)
    _settled: deque[str] = attrs.field(factory=deque, init=False, repr=False)
    _wanted: asyncio.Future[None] | None = attrs.field(default=None, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        host = self.settings.host or self.credentials.host or DEFAULT_HOST
        cloud = self.credentials.cloud_name
        origin = read_base_url(host, cloud)
        self._base = f"{origin}/v2/notifications/{quote(cloud, safe='')}/messages"

    async def listen(self) -> AsyncIterator[Delivery]:
        """Yield messages as they come.

        Raises:
            ApiError: The service refused.
            TransportError: No answer came.
            ResponseDecodeError: The answer cannot be read.
        """
        read_timeout = max(self.settings.read_timeout, LEAST_READ_TIMEOUT)
        transport = Transport.open(
            self.credentials,
            attrs.evolve(self.settings, read_timeout=read_timeout),
            version=__version__,
            http=None,
        )
        acknowledging = asyncio.create_task(self._acknowledge(transport))
        try:
            while True:
                asked_at = self.clock.monotonic()
                messages = await self._pull(transport)
                for delivery in _read_messages(messages):
                    yield delivery
                if not messages and self.clock.monotonic() - asked_at < EMPTY_PAUSE:
                    await self.clock.sleep(EMPTY_PAUSE)
        finally:
            acknowledging.cancel()
            try:
                async with self.clock.timeout_at(self.clock.monotonic() + PARTING_SECONDS):
                    await asyncio.wait({acknowledging})
                    await self._send_settled(transport)
            except TimeoutError:
                logger.info("Some pulled messages were not acknowledged; they will come again.")
            finally:
                await transport.close()

    async def _pull(self, transport: Transport) -> list[Any]:
        query = {
            "channel": self.channel,
            "max_messages": MESSAGES,
            "wait_seconds": WAIT_SECONDS,
            "visibility_timeout": self.visibility_timeout,
        }
        status, headers, body = await transport.get(
            URL(f"{self._base}?{urlencode(query)}", encoded=True)
        )
        if status != 200:
            raise read_error(status, headers, body, now=self.clock.wall(), model=None, feature=None)
        messages = read_object(body, status=status).get("messages")
        return messages if isinstance(messages, list) else []

    def settle(self, delivery: Delivery) -> None:
        """Have a message acknowledged soon, together with others."""
        if isinstance(delivery, PulledDelivery):
            self._settled.append(delivery.receipt_handle)
            if self._wanted is not None:
                wake(self._wanted)

    async def _acknowledge(self, transport: Transport) -> None:
        while True:
            if not self._settled:
                self._wanted = asyncio.get_running_loop().create_future()
                await self._wanted
            await self.clock.sleep(ACKNOWLEDGE_SECONDS)
            await self._send_settled(transport)

    async def _send_settled(self, transport: Transport) -> None:
        """Acknowledge what was settled. What fails comes again, and is settled again."""
        while self._settled:
            handles = [self._settled.popleft() for _ in range(min(MESSAGES, len(self._settled)))]
            body = json.dumps({"receipt_handles": handles}).encode()
            try:
                status, headers, answer = await transport.post(
                    URL(f"{self._base}/ack", encoded=True), body
                )
                if status != 200:
                    raise read_error(
                        status, headers, answer, now=self.clock.wall(), model=None, feature=None
                    )
            except AnalyzeError as error:
                logger.warning(
                    "%d pulled messages could not be acknowledged and will come again: %s",
                    len(handles),
                    error,
                )


def _read_messages(messages: list[Any]) -> Iterator[PulledDelivery]:
    for message in messages:
        try:
            yield read_message(message)
        except ValueError as error:
            logger.warning("A pulled message could not be read: %s", error)
