"""Redis as sink and source, for applications of several processes. Needs the ``redis`` extra.

Receivers put each delivery into a mailbox of its task (``SET NX EX``) and add the task's id to a
stream, in one ``MULTI``. The stream only wakes: every process reads all of it from a cursor of its
own, and looks into the mailboxes of the tasks that it waits for. So a delivery is found by
whichever process waits for it, before or after it came, as long as the mailbox is kept.

A webhook is answered 200 once Redis has stored it. How well Redis keeps it is up to how it is run:
with ``appendonly yes`` and ``appendfsync always`` it outlives a crash of Redis and of the machine;
with ``appendfsync everysec`` the last second of it may not; without persistence, or with a
``maxmemory-policy`` that evicts, or on a failover to a replica that lags, results can get lost.
What is lost shows as `ResultNotDeliveredError`.

One server, not a cluster. TLS is spoken with ``rediss://`` URLs.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Sequence
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import parse_qsl, urlsplit

import attrs

from cloudinary_analyze._clock import SYSTEM_CLOCK, Clock
from cloudinary_analyze.errors import (
    ConfigurationError,
    MalformedNotificationError,
    NotificationSourceError,
)
from cloudinary_analyze.notifications import decode_delivery, encode_delivery
from cloudinary_analyze.responses import Delivery
from cloudinary_analyze.webhooks import parse_delivery

try:
    from redis.asyncio import BlockingConnectionPool, Redis
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff
except ImportError as missing:
    raise ImportError(
        "Notifications over Redis need the redis library: pip install 'cloudinary-analyze[redis]'."
    ) from missing

logger = logging.getLogger("cloudinary_analyze")

CONNECTIONS: Final = 16
CONNECT_SECONDS: Final = 5.0
BLOCK_SECONDS: Final = 5.0
ANSWER_SECONDS: Final = 10.0  # over BLOCK_SECONDS, so that only a dead server exceeds it
WAKE_UPS: Final = 20_000
BATCH: Final = 500
AWAITED_SECONDS: Final = 120.0  # several of the listener's rounds, which renew it

_BEGINNING: Final = b"0-0"


@attrs.define(eq=False)
class RedisNotifications:
    """Redis between the receivers and the sessions of all processes.

    ::

        async with RedisNotifications("redis://…") as notifications:
            receiver = WebhookReceiver(notifications, credentials)
            async with AnalyzeSession(notifications=notifications, …) as session:
                ...

    Connects when it is first used. Close it after the session, with `aclose` or ``async with``.
    Belongs to one event loop, and to one session at a time.

    Attributes:
        url: ``redis://``, ``rediss://`` (TLS) or ``unix://``; parameters of the redis library may
            follow as a query, such as ``?ssl_ca_certs=…`` or ``?max_connections=…``.
        namespace: What all keys begin with. Receivers and sessions must agree on it.
        keep: Seconds that a delivery is kept. Until then any process can take the task up.
        clock: For tests.

    Raises:
        ConfigurationError: URL, namespace or time cannot be right.
    """

    url: str = attrs.field(repr=False)
    namespace: str = attrs.field(default="cloudinary-analyze", kw_only=True)
    keep: float = attrs.field(default=86_400.0, kw_only=True)
    clock: Clock = attrs.field(default=SYSTEM_CLOCK, kw_only=True, repr=False)
    _redis: Any = attrs.field(init=False, repr=False)
    _cursor: bytes | None = attrs.field(default=None, init=False, repr=False)
    _fixing: asyncio.Lock = attrs.field(factory=asyncio.Lock, init=False, repr=False)
    _awaited: dict[str, float] = attrs.field(factory=dict, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if not self.namespace:
            raise ConfigurationError("The namespace of the Redis keys is empty.")
        if not 1 <= self.keep < float("inf"):
            raise ConfigurationError(
                f"RedisNotifications.keep must be seconds, from 1 on, not {self.keep!r}."
            )
        self._redis = self._build_client(CONNECTIONS, retries=1)

    def _build_client(self, connections: int, *, retries: int) -> Any:
        options: dict[str, Any] = {
            "max_connections": connections,
            "timeout": CONNECT_SECONDS,
            "socket_connect_timeout": CONNECT_SECONDS,
            # ours in `_ask` instead: the library's can swallow a cancellation on Python 3.11
            "socket_timeout": None,
            "retry": Retry(NoBackoff(), retries),
            "protocol": 2,
        }
        try:
            if "socket_timeout" in dict(parse_qsl(urlsplit(self.url).query)):
                raise ConfigurationError(
                    "The Redis URL names a socket_timeout, which can keep a session from closing. "
                    "Leave it out: every command is bounded already."
                )
            return Redis.from_pool(BlockingConnectionPool.from_url(self.url, **options))
        except ConfigurationError:
            raise
        except (ValueError, TypeError):
            # the library's message may quote the URL, and with it the password
            raise ConfigurationError(
                "The Redis URL cannot be read. Pass redis://[user:password@]host:port/0, "
                "rediss://… for TLS, or unix:///path."
            ) from None

    @property
    def _stream(self) -> str:
        return f"{self.namespace}:wake-ups"

    def _name_mailbox(self, task_id: str) -> str:
        return f"{self.namespace}:delivery:{task_id}"

    async def put(self, delivery: Delivery, /) -> None:
        """Store a delivery and wake whoever waits for it. A second one for its task only wakes.

        Cancelling is safe: it is stored or not, and storing it again changes nothing.

        Raises:
            MalformedNotificationError: It names no analysis task.
            redis.RedisError: Redis did not store it.
            TimeoutError: It did not answer.
        """
        task_id = parse_delivery(delivery).task_id
        if task_id is None:
            raise MalformedNotificationError(
                "The notification names no analysis task, so there is no mailbox for it."
            )
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.set(
                self._name_mailbox(task_id),
                encode_delivery(delivery),
                nx=True,
                px=round(1000 * self.keep),
            )
            pipe.xadd(self._stream, {"task": task_id}, maxlen=WAKE_UPS, approximate=True)
            await self._ask(pipe.execute())

    async def listen(self) -> AsyncIterator[Delivery]:
        """Yield the deliveries of the tasks that were asked for, as they come.

        Raises:
            redis.RedisError: The connection broke.
            TimeoutError: Redis did not answer.
            NotificationSourceError: The stream was trimmed before it was read.
        """
        reader = self._build_client(1, retries=0)  # a hidden reconnect would hide a gap as well
        try:
            while True:
                for delivery in await self._collect(await self._read_wake_ups(reader)):
                    yield delivery
        finally:
            self._cursor = None
            await reader.aclose()

    async def _read_wake_ups(self, reader: Any) -> list[str]:
        """Wait for wake-ups; return the tasks among them that are awaited here."""
        cursor = await self._fix_cursor()
        answer = await self._ask(
            reader.xread({self._stream: cursor}, count=BATCH, block=round(1000 * BLOCK_SECONDS))
        )
        if not answer:
            return []
        ((_, entries),) = answer
        if len(entries) == BATCH and await self._may_have_lost(entries[0][0]):
            raise NotificationSourceError(
                f"Redis held more than {WAKE_UPS} wake-ups and dropped the oldest before they "
                "were read here; everything pending is fetched instead."
            )
        self._cursor = entries[-1][0]
        told = dict.fromkeys(fields.get(b"task", b"").decode() for _, fields in entries)
        return [task_id for task_id in told if task_id in self._awaited]

    async def _may_have_lost(self, first: bytes) -> bool:
        """Whether wake-ups before the first that was read may have been trimmed unread."""
        if await self._ask(self._redis.xlen(self._stream)) < WAKE_UPS:
            return False
        oldest = await self._ask(self._redis.xrange(self._stream, count=1))
        return not oldest or _read_entry_id(oldest[0][0]) >= _read_entry_id(first)

    async def _fix_cursor(self) -> bytes:
        """Return where to read on. It is fixed before the first fetch, so nothing falls between."""
        async with self._fixing:
            cursor = self._cursor
            if cursor is None:
                newest = await self._ask(self._redis.xrevrange(self._stream, count=1))
                cursor = self._cursor = newest[0][0] if newest else _BEGINNING
            return cursor

    async def fetch(self, task_ids: Sequence[str]) -> Sequence[Delivery]:
        """Return what is kept for these tasks; what comes later for them, `listen` yields.

        Raises:
            redis.RedisError: Redis refused, or could not be reached.
            TimeoutError: It did not answer.
        """
        await self._fix_cursor()
        self._await(task_ids)
        return await self._collect(task_ids)

    def _await(self, task_ids: Sequence[str]) -> None:
        now = self.clock.monotonic()
        for task_id in task_ids:
            self._awaited.pop(task_id, None)
            self._awaited[task_id] = now
        while self._awaited and next(iter(self._awaited.values())) < now - AWAITED_SECONDS:
            del self._awaited[next(iter(self._awaited))]

    async def _collect(self, task_ids: Sequence[str]) -> list[Delivery]:
        if not task_ids:
            return []
        found: list[Delivery] = []
        names = [self._name_mailbox(task_id) for task_id in task_ids]
        stored = await self._ask(self._redis.mget(names))
        for task_id, value in zip(task_ids, stored, strict=True):
            if value is None:
                continue
            self._awaited.pop(task_id, None)
            try:
                found.append(decode_delivery(value))
            except ValueError:
                logger.warning("What Redis holds for the task %s is no delivery.", task_id)
        return found

    async def _ask(self, command: Awaitable[Any]) -> Any:
        try:
            async with self.clock.timeout_at(self.clock.monotonic() + ANSWER_SECONDS):
                return await command
        except TimeoutError:
            raise TimeoutError(f"Redis did not answer within {ANSWER_SECONDS:.0f} s.") from None

    async def aclose(self) -> None:
        """Close the connections. Idempotent; what is used afterwards connects again."""
        await self._redis.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()


def _read_entry_id(entry_id: bytes) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition(b"-")
    return int(milliseconds), int(number)
