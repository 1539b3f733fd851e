"""Send notifications: sign, deliver, and deliver again."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Final, Literal

import aiohttp
import attrs

from cloudinary_analyze.emulator.counts import Counts
from cloudinary_analyze.emulator.notices import EmulatedTask, compose_notification
from cloudinary_analyze.emulator.quotas import QuotaBook
from cloudinary_analyze.emulator.scheduler import Scheduler
from cloudinary_analyze.responses import Delivery

_RETRY_DELAYS: Final = (180.0, 360.0, 540.0)
_STALE_AGE: Final = 3 * 3600
_TIMEOUT: Final = aiohttp.ClientTimeout(total=10)

_logger = logging.getLogger("cloudinary_analyze.emulator")

Hook = Callable[[Delivery], object]


@attrs.frozen(kw_only=True)
class WebhookPolicy:
    """The settings of the emulated account for notifications.

    Attributes:
        default_notification_url: The account's own URL, for requests that name none.
        digest: The digest of the signatures.
        retry_scale: A delivery whose response is not 200 is repeated after 180, 360 and 540
            seconds, multiplied by this.
        concurrency: The maximum number of deliveries at the same time.
    """

    default_notification_url: str | None = None
    digest: Literal["sha1", "sha256"] = attrs.field(
        default="sha1", validator=attrs.validators.in_(("sha1", "sha256"))
    )
    retry_scale: float = attrs.field(default=1.0, validator=attrs.validators.ge(0))
    concurrency: int = attrs.field(default=16, validator=attrs.validators.ge(1))


@attrs.frozen
class Envelope:
    """Notifications about one task, to be delivered to one place one after the other.

    The bodies are built when they are sent, so that waiting ones need little memory.

    Attributes:
        task: The task.
        place: A URL, or ``None`` for the hook.
        kinds: The kinds to send, in order.
        attempt: The number of earlier attempts.
    """

    task: EmulatedTask
    place: str | None
    kinds: tuple[str, ...]
    attempt: int = 0


@attrs.define(eq=False)
class WebhookSender:
    """Signs notifications and delivers them, a bounded number at the same time."""

    policy: WebhookPolicy
    secret: str = attrs.field(repr=False)
    quota_book: QuotaBook
    scheduler: Scheduler
    counts: Counts
    find_hook: Callable[[], Hook | None]
    _waiting: deque[Envelope] = attrs.field(factory=deque, init=False)
    _workers: set[asyncio.Task[None]] = attrs.field(factory=set, init=False)
    _http: aiohttp.ClientSession | None = attrs.field(default=None, init=False)
    _closed: bool = attrs.field(default=False, init=False)

    def send(self, envelope: Envelope) -> None:
        """Begin to deliver an envelope. Returns at once."""
        if self._closed:
            return
        if envelope.place is None and not inspect.iscoroutinefunction(self.find_hook()):
            for kind in envelope.kinds:
                self._settle(envelope, kind, self._hand_over(envelope, kind) is not False)
            return
        self._waiting.append(envelope)
        if len(self._workers) < self.policy.concurrency:
            worker = self.scheduler.loop.create_task(self._work())
            self._workers.add(worker)
            worker.add_done_callback(self._workers.discard)

    async def deliver(self, envelope: Envelope) -> None:
        """Deliver an envelope. Return when every notification in it has its response or has failed."""
        for kind in envelope.kinds:
            if envelope.place is None:
                taken = await self._hand_over_and_wait(envelope, kind)
            else:
                taken = await self._post(envelope, kind)
            self._settle(envelope, kind, taken)

    async def close(self) -> None:
        """Drop waiting deliveries, and cut off those in progress. Idempotent."""
        self._closed = True
        self._waiting.clear()
        workers = list(self._workers)
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
        if self._http is not None:
            await self._http.close()

    async def _work(self) -> None:
        while self._waiting:
            await self.deliver(self._waiting.popleft())

    def _settle(self, envelope: Envelope, kind: str, taken: bool) -> None:  # noqa: FBT001
        if taken:
            if kind in ("genuine", "duplicate"):
                envelope.task.notified = True
            return
        self.counts.webhooks_refused += 1
        if kind == "genuine" and envelope.attempt < len(_RETRY_DELAYS):
            again = attrs.evolve(envelope, kinds=("genuine",), attempt=envelope.attempt + 1)
            delay = _RETRY_DELAYS[envelope.attempt] * self.policy.retry_scale
            self.scheduler.push(delay, self.send, again)

    def _hand_over(self, envelope: Envelope, kind: str) -> object:
        """Pass a notification to the hook. Return its result, or ``False``."""
        body, headers = self._prepare(envelope, kind)
        hook = self.find_hook()
        if hook is None:
            return False
        try:
            return hook(Delivery(body, headers, received_at=time.time()))
        except Exception:
            _logger.exception("The hook for deliveries raised; it counts as not answered 200.")
            return False

    async def _hand_over_and_wait(self, envelope: Envelope, kind: str) -> bool:
        """Pass a notification to the hook, and await it if it is an async function."""
        taken = self._hand_over(envelope, kind)
        if inspect.isawaitable(taken):
            try:
                taken = await taken
            except Exception:
                _logger.exception("The hook for deliveries raised; it counts as not answered 200.")
                return False
        return taken is not False

    async def _post(self, envelope: Envelope, kind: str) -> bool:
        if self._closed or envelope.place is None:
            return False
        http = self._open_http()
        body, headers = self._prepare(envelope, kind)
        try:
            async with http.post(
                envelope.place, data=body, headers=headers, allow_redirects=False
            ) as response:
                # Reading the response lets the connection be used again.
                await response.content.read(1 << 16)
                return response.status == 200
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            _logger.debug("A notification was not delivered (%s).", type(error).__name__)
            return False

    def _open_http(self) -> aiohttp.ClientSession:
        if self._http is None:
            self._http = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0),
                cookie_jar=aiohttp.DummyCookieJar(),
                timeout=_TIMEOUT,
            )
        return self._http

    def _prepare(self, envelope: Envelope, kind: str) -> tuple[bytes, dict[str, str]]:
        again = kind == "genuine" and envelope.attempt > 0
        self.counts.webhooks["redelivery" if again else kind] += 1
        body = compose_notification(envelope.task, kind, self.quota_book)
        secret = f"not {self.secret}" if kind == "forged" else self.secret
        timestamp = str(int(time.time()) - (_STALE_AGE if kind == "stale" else 0))
        return body, {
            "Content-Type": "application/json",
            "X-Cld-Timestamp": timestamp,
            "X-Cld-Signature": sign(body, timestamp, secret, digest=self.policy.digest),
        }


def sign(body: bytes, timestamp: str, secret: str, *, digest: str) -> str:
    """Return the signature that the service would send: a plain digest, not an HMAC."""
    signed = body + timestamp.encode() + secret.encode()
    return hashlib.new(digest, signed, usedforsecurity=False).hexdigest()
