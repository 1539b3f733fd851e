"""`RedisLedger`: one ledger for the workers of many processes and machines. Needs ``redis``.

Every worker claims a key immediately before it sends the request, so each request is sent by one
worker at a time. The claims of a worker that died are taken over after about 1.5 leases. Its
requests in flight may have been charged; repeating them counts in
``SessionStats.ambiguous_retries``.

**Durability is that of the server.** Set ``maxmemory-policy noeviction`` (required) and
``appendonly yes``. With ``appendfsync always`` a recorded response survives a crash of Redis and of
the machine. With ``everysec``, a crash loses up to two seconds of writes; the workers that still
run repeat theirs. A response is lost, and paid for again, only if its worker ended in these seconds
or if a failover chose a replica that lags. If such a restart happens while a worker is paused for more
than 4 seconds, another worker may send the requests that it holds.

Each record takes some 400 bytes of memory for a small analysis. Above ten million records, export
them (`RedisLedger.iter_records`) to Parquet or a database, and use a new namespace.
"""

from __future__ import annotations

import asyncio
import json
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from functools import partial
from typing import Any, Final

import attrs

from cloudinary_analyze._clock import SYSTEM_CLOCK, Clock
from cloudinary_analyze._redis import LinkFailedError, RedisError, RedisLocation, read_location
from cloudinary_analyze._values import Closable
from cloudinary_analyze._wire import codec
from cloudinary_analyze.errors import (
    AnalyzeError,
    ConfigurationError,
    LedgerError,
    describe_reason,
    shorten,
)
from cloudinary_analyze.ledger.claims import KeyState, build_answer, read_state
from cloudinary_analyze.ledger.compression import compress, decompress
from cloudinary_analyze.ledger.encoding import dump_error, load_error, make_encodable
from cloudinary_analyze.ledger.items import LedgerItem
from cloudinary_analyze.ledger.worker import Names, Worker
from cloudinary_analyze.protocols import Claim, Ledger, LedgerRecord
from cloudinary_analyze.responses import JSONObject, Response

__all__ = ["RedisLedger"]

OPEN_PATIENCE: Final = 10.0  # seconds; a mistyped host must not wait as long as an outage
NOTED: Final = 200_000  # items whose source is remembered until their record
READ_BATCH: Final = 500  # records

_RAW: Final = b',"raw":'  # what follows the source and the model; no JSON text contains it
_STATES: Final = {"A": "answered", "F": "failed"}


def _pack(key: str) -> bytes:
    try:
        return bytes.fromhex(key)
    except ValueError:
        raise LedgerError(
            f"The keys of a ledger are hexadecimal, as AnalyzeRequest.key is, not {key!r:.80}."
        ) from None


def _read_seconds(least: float) -> Any:
    def validate(_: Any, attribute: Any, value: Any) -> None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not least <= value < float("inf"):
            raise ConfigurationError(
                f"RedisLedger.{attribute.name} must be at least {least:g} seconds, not {value!r:.80}."
            )

    return validate


@attrs.define(eq=False)
class RedisLedger(Closable, Ledger):
    """A ledger in Redis, shared by workers on any number of machines.

    ```python
    async with RedisLedger("redis://host:6379/0") as ledger, AnalyzeSession() as session:
        async for outcome in session.map(urls, Captioning, ledger=ledger):
            ...
    ```

    Before it is opened it can be pickled, and each copy that is opened is a worker. The pickle does
    not contain the password. Workers read it from ``REDIS_URL``, if that is the URL of the same
    server, or from the variable that the URL names: ``redis://host/0?password_env=NAME``.

    Workers can run the same items or parts of them in any order. Each request is sent once, and the
    other workers get its response from the ledger. Running the same code again resumes the job.

    While Redis cannot be reached, nothing is sent, and responses wait to be recorded.

    Attributes:
        location: The server. The argument is ``url``: ``redis://``, ``rediss://`` (TLS) or
            ``unix://``. Default: ``REDIS_URL``.
        namespace: The prefix of all keys. A namespace belongs to one host and cloud name.
        keep: Seconds that a record is kept. Default: without a limit.
        lease: Seconds after which a worker that stopped renewing its lease counts as dead. It must
            be longer than any pause of the process or its event loop.
        patience: Seconds to wait for Redis before the ledger raises `LedgerError`.
        clock: For tests.

    Raises:
        ConfigurationError: An argument is invalid.
    """

    location: RedisLocation = attrs.field(default=None, converter=read_location, alias="url")
    namespace: str = attrs.field(default="cloudinary-analyze", kw_only=True)
    keep: float | None = attrs.field(
        default=None, kw_only=True, validator=attrs.validators.optional(_read_seconds(1))
    )
    lease: float = attrs.field(default=30.0, kw_only=True, validator=_read_seconds(0.5))
    patience: float = attrs.field(default=300.0, kw_only=True, validator=_read_seconds(0))
    clock: Clock = attrs.field(default=SYSTEM_CLOCK, kw_only=True, repr=False)
    _worker: Worker | None = attrs.field(default=None, init=False, repr=False)
    _former: frozenset[str] = attrs.field(default=frozenset(), init=False, repr=False)
    _describe: Callable[[], Mapping[str, Any]] | None = attrs.field(
        default=None, init=False, repr=False
    )
    _noted: OrderedDict[str, tuple[str, str]] = attrs.field(
        factory=OrderedDict, init=False, repr=False
    )
    _named: OrderedDict[str, str] = attrs.field(factory=OrderedDict, init=False, repr=False)

    def __attrs_post_init__(self) -> None:
        if not isinstance(self.namespace, str) or not self.namespace:
            raise ConfigurationError("The namespace of the Redis keys must be a non-empty string.")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the arguments, without the password. The copy is not open."""
        names = ("namespace", "keep", "lease", "patience", "clock")
        return partial(type(self), self.location, **{n: getattr(self, n) for n in names}), ()

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        worker = getattr(self, "_worker", None)
        if worker is not None:
            if worker.loop.is_running():
                asyncio.run_coroutine_threadsafe(worker.stop(), worker.loop)
            _warn(
                f"{self!r} was dropped without being closed. Use `async with` or `aclose()`.",
                ResourceWarning,
                source=self,
            )

    @property
    def _names(self) -> Names:
        return Names(self.namespace)

    def describe(self, statistics: Callable[[], Mapping[str, Any]]) -> None:
        """Publish statistics of this worker, for `worker_stats`.

        Args:
            statistics: Returns a mapping that JSON can encode. Called at each renewal of the lease.
        """
        self._describe = statistics
        if self._worker is not None:
            self._worker.describe = statistics

    async def open(self, *, base_url: str, cloud_name: str) -> None:
        """Connect, and become a worker. Idempotent. Opens again after a failure.

        Cancelling is safe: a later call continues.

        Args:
            base_url: ``scheme://host[:port]`` of the service.
            cloud_name: The product environment.

        Raises:
            LedgerError: Redis cannot be reached, refuses the credentials, or may evict keys, or
                the namespace belongs to another host or cloud name.
        """
        owner = (base_url, cloud_name)
        worker = self._worker
        if worker is not None and worker.link.failure is not None:
            await self.aclose()
            worker = self._worker  # another call may have opened it meanwhile
        if worker is None:
            worker = self._worker = Worker(
                location=self.location,
                patience=min(self.patience, OPEN_PATIENCE),
                names=self._names,
                owner=owner,
                lease=self.lease,
                keep=0 if self.keep is None else round(1000 * self.keep),
                clock=self.clock,
                loop=asyncio.get_running_loop(),
                describe=self._describe or dict,
                former=self._former,
            )
        elif worker.loop is not asyncio.get_running_loop():
            raise LedgerError(
                f"The ledger {self.location} is open on another event loop. Close it there first."
            )
        elif worker.owner != owner:
            raise LedgerError(
                f"The ledger {self.location} is open for {worker.owner[1]} at {worker.owner[0]}, "
                f"and this session is of {cloud_name} at {base_url}. Use a ledger for each."
            )
        try:
            await worker.start()
        except LinkFailedError as error:
            if self._worker is worker:
                await self.aclose()
            raise self._explain(error) from error
        worker.link.patience = self.patience

    async def aclose(self) -> None:
        """Write what waits, end the lease, and disconnect. Idempotent.

        A cancelled close disconnects at once. What was not written yet is lost, and other workers
        take the claims over when the lease ends.
        """
        worker, self._worker = self._worker, None
        if worker is not None:
            self._former |= {worker.id}
            await worker.stop()

    def _use(self) -> Worker:
        worker = self._worker
        if worker is None:
            raise LedgerError(
                f"The ledger {self.location} is not open. A session's map() opens it, and it must "
                "stay open until the session is closed: put its `async with` before the session's."
            )
        if worker.loop is not asyncio.get_running_loop():
            raise LedgerError(f"The ledger {self.location} is open on another event loop.")
        return worker

    def _explain(self, error: LinkFailedError) -> LedgerError:
        return LedgerError(
            f"The ledger {self.location} cannot be used: {describe_reason(error)}. Existing records are intact. Fix "
            "the problem and run again."
        )

    async def find(self, key: str) -> LedgerRecord | None:
        """See `Ledger.find`. A task that another worker waits for is not reported.

        Raises:
            LedgerError: Redis cannot be used, or the record cannot be read.
        """
        worker = self._use()
        packed = _pack(key)
        try:
            value = await worker.link.ask("GET", worker.names.find_key(packed))
        except LinkFailedError as error:
            raise self._explain(error) from error
        if value is None:
            return None
        state = self._read(value)
        if state.state in _STATES:
            self._forget(key)  # another worker recorded it
            item = self._build_item(0, key, state)
            return LedgerRecord(
                key=key,
                task_id=state.task_id,
                response=item.response,
                error=item.error,
                seconds=state.seconds,
                source=item.source or None,
            )
        others = state.state == "C" and worker.tokens.get(packed) != state.token
        task_id = None if others else state.task_id
        if task_id is None and state.source is None:
            return None
        return LedgerRecord(key=key, task_id=task_id, source=state.source)

    async def claim(self, key: str) -> Claim | None:
        """See `Ledger.claim`.

        Raises:
            LedgerError: Redis cannot be used, or the claim of another worker cannot be read.
        """
        try:
            return await self._use().claim(_pack(key), self._named.get(key, ""))
        except LinkFailedError as error:
            raise self._explain(error) from error
        except ValueError as error:
            raise self._build_damage(error) from error

    async def watch(self, key: str) -> None:
        """See `Ledger.watch`.

        Raises:
            LedgerError: Redis cannot be used.
        """
        try:
            await self._use().watch(_pack(key))
        except LinkFailedError as error:
            raise self._explain(error) from error

    def release(self, key: str, *, ambiguous: bool) -> None:
        """See `Ledger.release`."""
        worker = self._worker
        self._forget(key)
        if worker is not None:
            worker.release(_pack(key), ambiguous=ambiguous)

    async def record_submitted(self, key: str, task_id: str | None) -> None:
        """See `Ledger.record_submitted`.

        Raises:
            LedgerError: It could not be written.
        """
        try:
            await self._use().record_submitted(_pack(key), task_id)
        except LinkFailedError as error:
            raise self._explain(error) from error

    async def record_response(self, key: str, response: Response[Any], *, seconds: float) -> None:
        """See `Ledger.record_response`.

        Raises:
            LedgerError: It could not be written.
        """
        await self._record(key, "A", codec.dumps(dict(response.raw)), seconds)

    async def record_error(self, key: str, error: AnalyzeError, *, seconds: float) -> None:
        """See `Ledger.record_error`.

        Raises:
            LedgerError: It could not be written.
        """
        await self._record(key, "F", dump_error(error), seconds)

    async def _record(self, key: str, state: str, content: bytes, seconds: float) -> None:
        worker = self._use()
        source, model = self._noted.get(key, (self._named.get(key), None))
        self._forget(key)
        head = codec.dumps({"source": source, "model": model})
        # an envelope without a second pass over the content
        payload = compress(head[:-1] + _RAW + content + b"}")
        try:
            await worker.record_answer(_pack(key), state, build_answer(seconds, payload))
        except LinkFailedError as error:
            raise self._explain(error) from error

    async def note_source(self, key: str, source: str) -> None:
        """See `Ledger.note_source`. The source is stored with the claim."""
        self._named[key] = make_encodable(source)
        if len(self._named) > NOTED:
            self._named.popitem(last=False)

    async def note_item(self, key: str, *, source: str, model: str, index: int) -> None:  # noqa: ARG002
        """See `Ledger.note_item`. The source is stored with the response; the index is not."""
        self._noted[key] = (make_encodable(source), model)
        if len(self._noted) > NOTED:
            self._noted.popitem(last=False)

    def _forget(self, key: str) -> None:
        self._noted.pop(key, None)
        self._named.pop(key, None)

    def iter_records(self) -> Iterator[LedgerItem]:
        """Yield every final response and error, in no order.

        Blocks. Needs no `open`, and does not affect the workers. Records that are written meanwhile
        may or may not be included. ``index`` counts the records from 0.

        Raises:
            LedgerError: Redis cannot be used, or a record cannot be read.
        """
        names, seen, count = self._names, set[bytes](), 0
        try:
            with closing(self.location.build_blocking_client()) as client:
                found = client.scan_iter(match=_quote(names.prefix) + b"*", count=READ_BATCH)
                for keys in _batch(found, READ_BATCH):
                    fresh = [key for key in dict.fromkeys(keys) if key[-16:] not in seen]
                    seen.update(key[-16:] for key in fresh)  # a scan may repeat a key
                    for key, value in zip(fresh, client.mget(fresh) if fresh else [], strict=True):
                        if value is None or value[:1] not in {b"A", b"F"}:
                            continue
                        text = key[len(names.prefix) :].hex()
                        yield self._build_item(count, text, self._read(value))
                        count += 1
        except RedisError as error:
            raise self._explain(LinkFailedError(shorten(str(error)))) from error

    def worker_stats(self) -> list[dict[str, Any]]:
        """Return the statistics of each running worker, the newest first. Blocks.

        ``worker`` is its name, ``at`` the Unix time of its last renewal, and ``claims`` the number
        of requests that it holds. The other entries come from `describe`.

        Raises:
            LedgerError: Redis cannot be used.
        """
        names = self._names
        try:
            with closing(self.location.build_blocking_client()) as client:
                workers = client.zrevrange(names.workers, 0, -1)
                leases = [names.find_lease(worker.decode(errors="replace")) for worker in workers]
                found = client.mget(leases) if leases else []
        except RedisError as error:
            raise self._explain(LinkFailedError(shorten(str(error)))) from error
        return [shown for value in found if (shown := _read_stats(value)) is not None]

    def _read(self, value: bytes) -> KeyState:
        try:
            return read_state(value)
        except ValueError as error:
            raise self._build_damage(error) from error

    def _build_item(self, index: int, key: str, state: KeyState) -> LedgerItem:
        response: JSONObject | None = None
        error: AnalyzeError | None = None
        try:
            # apart from its envelope, because both together may be nested too deeply to be read
            head, _, content = decompress(state.payload).partition(_RAW)
            noted = codec.loads(head + b"}")
            source, model = noted["source"], noted["model"]
            if not isinstance(source, str | None) or not isinstance(model, str | None):
                raise TypeError("the source or the model is not a text")
            if state.state == "F":
                error = load_error(content[:-1])
            elif not isinstance(response := codec.loads(content[:-1]), dict):
                raise TypeError("the response is not an object")
        except (ValueError, LookupError, TypeError, RecursionError) as damage:
            raise self._build_damage(damage) from damage
        return LedgerItem(
            index=index,
            line=None,
            source=source or "",
            model=model,
            key=key,
            task_id=state.task_id,
            response=response,
            error=error,
            seconds=state.seconds,
        )

    def _build_damage(self, error: Exception) -> LedgerError:
        return LedgerError(
            f"A record in the ledger {self.location} cannot be read ({shorten(str(error))}). Use the version of "
            "the package that wrote it, or another namespace."
        )


def _read_stats(value: bytes | None) -> dict[str, Any] | None:
    """Return what a worker shows of itself, or ``None`` if that cannot be read."""
    try:
        shown = None if value is None else json.loads(value)
    except (ValueError, RecursionError):
        return None
    return shown if isinstance(shown, dict) else None


def _quote(prefix: bytes) -> bytes:
    """Return a pattern that matches a text literally."""
    return b"".join(
        b"\\" + bytes((byte,)) if byte in b"*?[]^\\" else bytes((byte,)) for byte in prefix
    )


def _batch(values: Iterator[bytes], size: int) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    for value in values:
        batch.append(value)
        if len(batch) >= size:
            yield batch
            batch = []
    yield batch
