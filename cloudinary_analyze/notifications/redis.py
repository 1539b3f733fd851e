"""Redis as sink and source, for applications of several processes. Needs the ``redis`` extra.

Receivers put each delivery into a mailbox of its task (``SET PX``) and add the task's id to a
stream, in one ``MULTI``. The stream only wakes: every process reads all of it from a cursor of its
own, and fetches the mailboxes of the tasks that it waits for. So the process that waits for a
delivery finds it, whether it arrives before or after, while the mailbox is kept.

A receiver answers 200 once Redis has stored the delivery. One writer stores everything that waits
in one round trip, so a burst needs few of them. How durable that is depends on Redis: with
``appendonly yes`` and ``appendfsync always`` a delivery outlives a crash of Redis and of the
machine; with ``appendfsync everysec`` the last second may be lost; without persistence, with a
``maxmemory-policy`` that evicts, or on a failover to a replica that lags, results can be lost.
A lost result ends as `ResultNotDeliveredError`.

With `cloudinary_analyze.telemetry`, a session that submits a task keeps its trace context beside
the mailbox (``{namespace}:trace:{task id}``), for the receiver and the session that get the
notification. A task without a trace context is handled the same, but not traced.

One server, not a cluster. Use ``rediss://`` for TLS.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Awaitable, Iterable, Sequence
from contextvars import Context
from functools import partial
from typing import Any, Final

import attrs

from cloudinary_analyze._clock import SYSTEM_CLOCK, Clock
from cloudinary_analyze._redis import RedisConnectionError, RedisLocation, read_location
from cloudinary_analyze._values import Closable
from cloudinary_analyze._wire.protocol import find_result, reports_progress
from cloudinary_analyze.errors import (
    ConfigurationError,
    MalformedNotificationError,
    NotificationSourceError,
    shorten,
)
from cloudinary_analyze.notifications import decode_delivery, encode_delivery
from cloudinary_analyze.protocols import TRACE_HEADER, FollowPut
from cloudinary_analyze.responses import Delivery
from cloudinary_analyze.webhooks import parse_delivery

__all__ = ["RedisNotifications"]

logger: logging.Logger = logging.getLogger("cloudinary_analyze.notifications")

CONNECTIONS: Final = 16
BLOCK_SECONDS: Final = 5.0
ANSWER_SECONDS: Final = 10.0  # more than BLOCK_SECONDS, so that only a dead server exceeds it
WRITE_BATCH: Final = 256  # deliveries in one round trip
WRITE_BYTES: Final = 2**22
WAKE_UPS: Final = 20_000
BATCH: Final = 500
AWAITED_SECONDS: Final = 120.0  # several rounds of the listener, each of which renews it
EXPIRE_BATCH: Final = 2_000  # ids that one fetch forgets, more than it adds

_BEGINNING: Final = b"0-0"


@attrs.define(eq=False)
class _Put:
    """A delivery that waits to be stored.

    Attributes:
        stored: Resolved once Redis stored it, with the trace context of its task if that is wanted;
            cancelled if the receiver stopped waiting.
    """

    task_id: str
    delivery: Delivery
    final: bool
    stored: asyncio.Future[str | None]


@attrs.frozen(eq=False)
class _StoredDelivery(Delivery):
    """A delivery from a mailbox, with the task that the mailbox belongs to."""

    task_id: str = attrs.field(kw_only=True)


@attrs.define(eq=False)
class RedisNotifications(Closable):
    """Redis between the receivers and the sessions of all processes.

    ```python
    async with RedisNotifications("redis://…") as notifications:
        receiver = WebhookReceiver(notifications, credentials)
        async with AnalyzeSession(notifications=notifications) as session:
            ...
    ```

    Before its first use it can be pickled. The pickle does not contain the password. Workers read
    it from ``REDIS_URL``, if that has the same server and user, or from the variable that the URL
    names: ``redis://host/0?password_env=NAME``. A worker that finds no password raises an error and
    does not connect without one.

    It connects at its first use. Close it after the session, with `aclose` or ``async with``. It
    belongs to one event loop, and to one session at a time.

    Attributes:
        location: The server. The argument is ``url``: ``redis://``, ``rediss://`` (TLS) or
            ``unix://``. The query may set ``db``, ``max_connections``, ``health_check_interval``,
            ``client_name``, the credentials, ``password_env`` (the variable that holds the
            password), and options of sockets and TLS, such as ``?ssl_ca_certs=…``. Default:
            ``REDIS_URL``.
        namespace: The prefix of all keys. Receivers and sessions must use the same one.
        keep: Seconds that a delivery is kept. Until then any process can resume the task.
        keep_resolved: Seconds that a delivery is kept once a session has resolved its task with it,
            for the handles of other processes. `keep` if that is shorter.
        clock: For tests.
        unreadable: The number of mailboxes that did not contain a delivery and were skipped.

    Raises:
        ConfigurationError: The URL, the namespace or a time is invalid.
    """

    location: RedisLocation = attrs.field(converter=read_location, alias="url", default=None)
    namespace: str = attrs.field(default="cloudinary-analyze", kw_only=True)
    keep: float = attrs.field(default=86_400.0, kw_only=True)
    keep_resolved: float = attrs.field(default=3_600.0, kw_only=True)
    clock: Clock = attrs.field(default=SYSTEM_CLOCK, kw_only=True, repr=False)
    unreadable: int = attrs.field(default=0, init=False, repr=False)
    _redis: Any = attrs.field(default=None, init=False, repr=False)
    _cursor: bytes | None = attrs.field(default=None, init=False, repr=False)
    _fixing: asyncio.Lock = attrs.field(factory=asyncio.Lock, init=False, repr=False)
    _awaited: OrderedDict[str, float] = attrs.field(factory=OrderedDict, init=False, repr=False)
    _waiting: deque[_Put] = attrs.field(factory=deque, init=False, repr=False)
    _resolved: deque[str] = attrs.field(factory=deque, init=False, repr=False)
    _traces: deque[tuple[str, str]] = attrs.field(factory=deque, init=False, repr=False)
    _follow: FollowPut | None = attrs.field(default=None, init=False, repr=False)
    _writer: asyncio.Task[None] | None = attrs.field(default=None, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if not self.namespace:
            raise ConfigurationError("The namespace of the Redis keys is empty.")
        for name in ("keep", "keep_resolved"):
            seconds = getattr(self, name)
            if not 1 <= seconds < float("inf"):
                raise ConfigurationError(
                    f"RedisNotifications.{name} must be at least 1 second, not {seconds!r}."
                )

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments, without the password."""
        names = ("namespace", "keep", "keep_resolved", "clock")
        return partial(type(self), self.location, **{n: getattr(self, n) for n in names}), ()

    def _connect(self) -> Any:
        if self._redis is None:
            self._redis = self.location.build_client(CONNECTIONS, retries=1)
        return self._redis

    @property
    def _stream(self) -> str:
        return f"{self.namespace}:wake-ups"

    def _name_mailbox(self, task_id: str) -> str:
        return f"{self.namespace}:delivery:{task_id}"

    def _name_trace(self, task_id: str) -> str:
        return f"{self.namespace}:trace:{task_id}"

    async def put(self, delivery: Delivery, /) -> None:
        """Store a delivery and wake the processes that wait for it.

        A delivery with a result or an error replaces the content of the mailbox. Any other fills an
        empty mailbox only. A delivery that reports that its task is still running is not stored.
        Cancelling is safe: the delivery is stored or not, and storing it again is harmless.

        Raises:
            MalformedNotificationError: The delivery names no analysis task.
            redis.RedisError: Redis did not store it.
            TimeoutError: Redis did not respond.
        """
        notification = parse_delivery(delivery)
        task_id = notification.task_id
        if task_id is None:
            raise MalformedNotificationError(
                "The notification names no analysis task, so there is no mailbox for it."
            )
        if reports_progress(notification):
            return
        final = notification.failed or find_result(notification.raw) is not None
        stored: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Put(task_id, delivery, final, stored))
        self._start_writer()
        await (stored if self._follow is None else self._follow(task_id, stored))

    def acknowledge(self, delivery: Delivery) -> None:
        """Let the mailbox of a resolved task expire after `keep_resolved` seconds.

        Args:
            delivery: An object that `listen` or `fetch` returned.
        """
        if isinstance(delivery, _StoredDelivery):
            self._resolved.append(delivery.task_id)
            self._start_writer()

    def carry_traces(self, follow: FollowPut) -> None:
        """Fetch the trace context with each delivery from now on.

        Args:
            follow: See `TraceCarrier.carry_traces`.
        """
        self._follow = follow

    def note_trace(self, task_id: str, trace: str) -> None:
        """Keep the trace context of a task for `keep` seconds."""
        self._traces.append((task_id, trace))
        self._start_writer()

    def _start_writer(self) -> None:
        if self._writer is None or self._writer.done():
            # it serves all waiters, so it does not run in the context of the first
            self._writer = Context().run(asyncio.create_task, self._write())
            self._writer.add_done_callback(self._end_writer)

    def _end_writer(self, writer: asyncio.Task[None]) -> None:
        """Fail the deliveries that a cancelled writer left, even if it never started."""
        if self._writer is writer:
            self._fail_waiting(RedisConnectionError("The connection to Redis was closed."))

    def _fail_waiting(self, error: Exception) -> None:
        _fail(self._waiting, error)
        self._waiting.clear()
        self._resolved.clear()
        self._traces.clear()

    async def _write(self) -> None:
        """Store the waiting deliveries, batch by batch, until none is left."""
        while self._waiting or self._resolved or self._traces:
            batch = self._take_batch()
            resolved = [self._resolved.popleft() for _ in range(min(BATCH, len(self._resolved)))]
            traces = [self._traces.popleft() for _ in range(min(BATCH, len(self._traces)))]
            try:
                await self._write_batch(batch, resolved, traces)
            except (RedisConnectionError, TimeoutError) as error:
                _fail(batch, error)
                self._fail_waiting(error)  # the next batch would fail in the same way
            except Exception as error:
                _fail(batch, error)
            finally:  # a cancellation
                _fail(batch, RedisConnectionError("The connection to Redis was closed."))

    def _take_batch(self) -> list[_Put]:
        batch: list[_Put] = []
        size = 0
        while self._waiting and len(batch) < WRITE_BATCH and size < WRITE_BYTES:
            put = self._waiting.popleft()
            if not put.stored.done():  # cancelled meanwhile
                batch.append(put)
                size += len(put.delivery.body)
        return batch

    async def _write_batch(
        self, batch: Sequence[_Put], resolved: Iterable[str], traces: Sequence[tuple[str, str]]
    ) -> None:
        keep = round(1000 * self.keep)
        traced = self._follow is not None
        async with self._connect().pipeline(transaction=True) as pipe:
            for put in batch:
                name, value = self._name_mailbox(put.task_id), encode_delivery(put.delivery)
                pipe.set(name, value, nx=not put.final, px=keep)
                pipe.xadd(self._stream, {"task": put.task_id}, maxlen=WAKE_UPS, approximate=True)
            for task_id, trace in traces:
                pipe.set(self._name_trace(task_id), trace, px=keep)
            if traced and batch:
                pipe.mget([self._name_trace(put.task_id) for put in batch])
            for task_id in resolved:
                pipe.pexpire(
                    self._name_mailbox(task_id), min(keep, round(1000 * self.keep_resolved))
                )
            replies = await self._ask(pipe.execute(raise_on_error=False))
        found = replies[2 * len(batch) + len(traces)] if traced and batch else None
        for number, put in enumerate(batch):
            pair = replies[2 * number : 2 * number + 2]
            error = next((reply for reply in pair if isinstance(reply, Exception)), None)
            if error is not None:
                _fail([put], error)
            elif not put.stored.done():
                put.stored.set_result(_read_trace(found[number]) if type(found) is list else None)

    async def listen(self) -> AsyncIterator[Delivery]:
        """Yield the deliveries of the tasks that `fetch` was called with, as they arrive.

        Cancelling is safe: deliveries stay in Redis, where `fetch` finds them.

        Raises:
            redis.RedisError: The connection was lost.
            TimeoutError: Redis did not respond.
            NotificationSourceError: The stream was trimmed before it was read.
        """
        reader = self.location.build_client(1)  # a hidden reconnect would hide a gap as well
        try:
            while True:
                for delivery in await self._collect(await self._read_wake_ups(reader)):
                    yield delivery
        finally:
            self._cursor = None
            await _close(reader)

    async def _read_wake_ups(self, reader: Any) -> list[str]:
        """Wait for wake-ups. Return the tasks among them that are awaited here."""
        cursor = await self._fix_cursor()
        reply = await self._ask(
            reader.xread({self._stream: cursor}, count=BATCH, block=round(1000 * BLOCK_SECONDS))
        )
        if not reply:
            return []
        ((_, entries),) = reply
        if len(entries) == BATCH and await self._may_have_lost(entries[0][0]):
            raise NotificationSourceError(
                f"Redis held more than {WAKE_UPS} wake-ups and dropped the oldest before they "
                "were read here; everything pending is fetched instead."
            )
        self._cursor = entries[-1][0]
        named = dict.fromkeys(
            fields.get(b"task", b"").decode(errors="replace") for _, fields in entries
        )
        return [task_id for task_id in named if task_id in self._awaited]

    async def _may_have_lost(self, first: bytes) -> bool:
        """Whether wake-ups before the first that was read may have been trimmed unread."""
        if await self._ask(self._connect().xlen(self._stream)) < WAKE_UPS:
            return False
        oldest = await self._ask(self._connect().xrange(self._stream, count=1))
        return not oldest or _read_entry_id(oldest[0][0]) >= _read_entry_id(first)

    async def _fix_cursor(self) -> bytes:
        """Return the position to read from, fixed before the first fetch to miss nothing."""
        async with self._fixing:
            cursor = self._cursor
            if cursor is None:
                newest = await self._ask(self._connect().xrevrange(self._stream, count=1))
                cursor = self._cursor = newest[0][0] if newest else _BEGINNING
            return cursor

    async def fetch(self, task_ids: Sequence[str]) -> Sequence[Delivery]:
        """Return the deliveries that are kept for these tasks. `listen` yields later ones.

        Cancelling is safe.

        Args:
            task_ids: The tasks.

        Raises:
            redis.RedisError: Redis refused, or could not be reached.
            TimeoutError: Redis did not respond.
        """
        await self._fix_cursor()
        self._await(task_ids)
        return await self._collect(task_ids)

    def _await(self, task_ids: Sequence[str]) -> None:
        """Add ids that `listen` yields, and remove a bounded number of ids not fetched lately."""
        now = self.clock.monotonic()
        for task_id in task_ids:
            self._awaited[task_id] = now
            self._awaited.move_to_end(task_id)
        for _ in range(EXPIRE_BATCH):
            if not self._awaited or next(iter(self._awaited.values())) >= now - AWAITED_SECONDS:
                break
            self._awaited.popitem(last=False)

    async def _collect(self, task_ids: Sequence[str]) -> list[Delivery]:
        if not task_ids:
            return []
        found: list[Delivery] = []
        names = [self._name_mailbox(task_id) for task_id in task_ids]
        if self._follow is not None:
            names += [self._name_trace(task_id) for task_id in task_ids]
        values = await self._ask(self._connect().mget(names))
        traces = values[len(task_ids) :] or [None] * len(task_ids)
        for task_id, value, trace in zip(task_ids, values, traces, strict=False):
            if value is None:
                continue
            try:
                stored = decode_delivery(value)
            except ValueError:
                self.unreadable += 1
                logger.warning(
                    "The mailbox of the task %s does not hold a delivery.", shorten(task_id)
                )
                continue
            self._awaited.pop(task_id, None)
            headers = stored.headers
            if (context := _read_trace(trace)) is not None:
                headers = {**headers, TRACE_HEADER: context}
            found.append(
                _StoredDelivery(
                    stored.body, headers, received_at=stored.received_at, task_id=task_id
                )
            )
        return found

    async def _ask(self, command: Awaitable[Any]) -> Any:
        try:
            async with self.clock.timeout_at(self.clock.monotonic() + ANSWER_SECONDS):
                return await command
        except TimeoutError:
            raise TimeoutError(f"Redis did not respond within {ANSWER_SECONDS:.0f} s.") from None

    async def aclose(self) -> None:
        """Store what waits, for up to 10 s, then disconnect. Idempotent. A later use reconnects.

        A cancelled close does not wait. A receiver answers 503 for what was not stored, and the
        sender tries again.
        """
        writer = self._writer
        try:
            if writer is not None and not writer.done():
                await asyncio.wait({writer}, timeout=ANSWER_SECONDS)
        finally:
            if writer is not None and not writer.done():
                writer.cancel()
                # a library below may swallow the cancellation, and the writer would connect again
                self._fail_waiting(RedisConnectionError("The connection to Redis was closed."))
            client, self._redis = self._redis, None
            if client is not None:
                await _close(client)


def _fail(puts: Iterable[_Put], error: Exception) -> None:
    for put in puts:
        if not put.stored.done():
            put.stored.set_exception(error)
            put.stored.exception()  # retrieved, even if the receiver is cancelled right now


async def _close(client: Any) -> None:
    """Close a client, in the background if cancelled, because redis would leave connections open."""
    await asyncio.shield(client.aclose())


def _read_trace(value: object) -> str | None:
    return value.decode("ascii", "replace") if isinstance(value, bytes) else None


def _read_entry_id(entry_id: bytes) -> tuple[int, int]:
    milliseconds, _, number = entry_id.partition(b"-")
    return int(milliseconds), int(number)
