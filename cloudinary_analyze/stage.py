"""Bulk analysis on many processes and machines, in any engine.

An engine pickles an `AnalyzeStage`, sends it to its workers, and calls it there with lists of
items. The stage returns one outcome for each item. The workers share three things through Redis:
the ledger (`RedisLedger`), the pace (`RedisPacer`) and the notifications of tasks
(`RedisNotifications`):

```python
stage = AnalyzeStage(
    Captioning,
    ledger=RedisLedger("redis://host:6379/0"),
    settings=Settings(pacer=RedisPacer("redis://host:6379/0", rate=50)),
)
outcomes = stage(urls)
```

Workers read their credentials from ``CLOUDINARY_URL`` and the password of Redis from ``REDIS_URL``.

*Resume.* Run the same job again, with the same ledger. Recorded responses are restored, and the rest
is sent. The partitions may differ, and several jobs may run over the same items at the same time.

*Stops.* An exhausted quota or refused credentials do not raise, so the engine keeps the responses
that were paid for. The remaining items are marked ``stopped``; see `outcome_columns`.

*Killed workers.* The engine repeats the partition. Recorded responses are restored. At most as many
requests as the worker had in flight are sent and charged again, and
``SessionStats.ambiguous_retries`` counts them. `worker_stats` shows all workers while they run.

*Partitions.* A session is fast with some hundred items or more in flight, so prefer few large
partitions to many small ones. Processes multiply the permits: 8 workers with 64 permits have 512
requests in flight. The account's limits apply to all of them together; a pacer keeps them below it.

*Without an engine.* ``cloudinary-analyze run --ledger redis://host/0 --shard 1/4`` on each of four
machines.

The programs below analyze the column ``url`` of ``urls.parquet``.

A process pool:

```python
from concurrent.futures import ProcessPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq

from cloudinary_analyze import Captioning
from cloudinary_analyze.ledger.redis import RedisLedger
from cloudinary_analyze.stage import SCHEMA, AnalyzeStage, outcome_columns

stage = AnalyzeStage(Captioning, ledger=RedisLedger())


def analyze(urls):
    return pa.table(outcome_columns(stage(urls)), SCHEMA)


if __name__ == "__main__":
    urls = pq.read_table("urls.parquet")["url"].to_pylist()
    parts = [urls[start : start + 500] for start in range(0, len(urls), 500)]
    with ProcessPoolExecutor(2) as pool, pq.ParquetWriter("results.parquet", SCHEMA) as file:
        for table in pool.map(analyze, parts):
            file.write_table(table)
```

Dask dataframes, Parquet to Parquet. The plugin closes the sessions when a worker ends:

```python
import dask.dataframe as dd
import pandas as pd
from dask.distributed import Client

from cloudinary_analyze import Captioning
from cloudinary_analyze.dask import AnalyzePlugin
from cloudinary_analyze.ledger.redis import RedisLedger
from cloudinary_analyze.stage import META, SCHEMA, AnalyzeStage, outcome_columns

stage = AnalyzeStage(Captioning, ledger=RedisLedger())


def analyze(part):
    return pd.DataFrame(outcome_columns(stage(part["url"]))).astype(META.dtypes)


if __name__ == "__main__":
    with Client(n_workers=2, threads_per_worker=1) as client:
        client.register_plugin(AnalyzePlugin())
        frame = dd.read_parquet("urls.parquet").repartition(npartitions=4)
        results = frame.map_partitions(analyze, meta=META)
        results.to_parquet("results", schema=SCHEMA, write_index=False)
```

Dask bags:

```python
import pandas as pd
from dask import bag
from dask.distributed import Client

from cloudinary_analyze import Captioning
from cloudinary_analyze.dask import AnalyzePlugin
from cloudinary_analyze.ledger.redis import RedisLedger
from cloudinary_analyze.stage import META, SCHEMA, AnalyzeStage, outcome_columns

stage = AnalyzeStage(Captioning, ledger=RedisLedger())


def analyze(urls):
    columns = outcome_columns(stage(urls))
    return [dict(zip(columns, row)) for row in zip(*columns.values())]


if __name__ == "__main__":
    with Client(n_workers=2, threads_per_worker=1) as client:
        client.register_plugin(AnalyzePlugin())
        urls = pd.read_parquet("urls.parquet")["url"].tolist()
        rows = bag.from_sequence(urls, npartitions=4).map_partitions(analyze)
        results = rows.to_dataframe(meta=META)
        results.to_parquet("results", schema=SCHEMA, write_index=False)
```

Hugging Face datasets:

```python
from datasets import Dataset, Features

from cloudinary_analyze import Captioning
from cloudinary_analyze.ledger.redis import RedisLedger
from cloudinary_analyze.stage import SCHEMA, AnalyzeStage, outcome_columns

stage = AnalyzeStage(Captioning, ledger=RedisLedger())


def analyze(batch):
    return outcome_columns(stage(batch["url"]))


if __name__ == "__main__":
    dataset = Dataset.from_parquet("urls.parquet")
    results = dataset.map(
        analyze,
        batched=True,
        batch_size=500,
        num_proc=2,
        remove_columns=["url"],
        features=Features.from_arrow_schema(SCHEMA),
    )
    results.to_parquet("results.parquet")
```

Ray Data. Actors keep their session between batches; ``repartition`` makes large ones:

```python
import pyarrow as pa
import ray

from cloudinary_analyze import Captioning
from cloudinary_analyze.ledger.redis import RedisLedger
from cloudinary_analyze.stage import SCHEMA, AnalyzeStage, outcome_columns


class Analyze:
    def __init__(self):
        self.stage = AnalyzeStage(Captioning, ledger=RedisLedger())

    def __call__(self, table):
        outcomes = self.stage(table["url"].to_pylist())
        return pa.table(outcome_columns(outcomes), SCHEMA)


if __name__ == "__main__":
    dataset = ray.data.read_parquet("urls.parquet").repartition(4)
    dataset.map_batches(
        Analyze, batch_format="pyarrow", batch_size=None, concurrency=2, num_cpus=0.5
    ).write_parquet("results")
```

Spark:

```python
import pyarrow as pa
from pyspark.sql import SparkSession
from pyspark.sql.pandas.types import from_arrow_schema

from cloudinary_analyze import Captioning
from cloudinary_analyze.ledger.redis import RedisLedger
from cloudinary_analyze.stage import SCHEMA, AnalyzeStage, outcome_columns

stage = AnalyzeStage(Captioning, ledger=RedisLedger())


def analyze(batches):
    for batch in batches:
        outcomes = stage(batch["url"].to_pylist())
        yield pa.RecordBatch.from_pydict(outcome_columns(outcomes), SCHEMA)


if __name__ == "__main__":
    spark = SparkSession.builder.getOrCreate()
    frame = spark.read.parquet("urls.parquet").repartition(4)
    results = frame.mapInArrow(analyze, from_arrow_schema(SCHEMA))
    results.write.parquet("results")
```

*Prefect and Airflow* run tasks, not partitions. Call the stage in a task with the URLs of one part
(in Airflow: a mapped task), and let the task write its table to a file. Retries of the task are safe,
because the ledger restores what was answered. Return file names, not outcomes: both keep results in
a database.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import logging
import os
import pickle
import socket
import threading
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from importlib import import_module
from typing import Any, Final, Generic, TypeVar, cast

import attrs

from cloudinary_analyze._policy import find_stop
from cloudinary_analyze.config import Credentials, Settings
from cloudinary_analyze.errors import AnalyzeError, BulkStoppedError, ConfigurationError, describe
from cloudinary_analyze.outcomes import Answered, AnyOutcome, Failed, Outcome
from cloudinary_analyze.protocols import Ledger, NotificationSource
from cloudinary_analyze.requests import AnalyzeRequest, KeyBuilder
from cloudinary_analyze.responses import Response
from cloudinary_analyze.results.export import COLUMNS as _EXPORTED
from cloudinary_analyze.results.export import build_row
from cloudinary_analyze.results.records import build_record
from cloudinary_analyze.session import AnalyzeSession, Mode

__all__ = [
    "COLUMNS",
    "META",
    "SCHEMA",
    "AnalyzeStage",
    "close_sessions",
    "outcome_columns",
    "worker_stats",
]

Item = TypeVar("Item")
A = TypeVar("A")
T = TypeVar("T")

logger: logging.Logger = logging.getLogger("cloudinary_analyze.ledger")

CLOSE_SECONDS: Final = 30.0

COLUMNS: Final[Mapping[str, type[Any]]] = {
    "status": str,
    "restored": bool,
    **{name: kind for name, kind in _EXPORTED.items() if name not in {"index", "line", "status"}},
}
"""The columns of `outcome_columns` and their types; each but ``status`` may be ``None``."""

SCHEMA: Any
"""`COLUMNS` as a schema of Arrow. Needs ``pyarrow``."""

META: Any
"""`COLUMNS` as an empty pandas table, the ``meta`` of Dask. Needs ``pandas``."""


@attrs.frozen
class AnalyzeStage(Generic[Item, A]):
    """Analyzes the items of a partition, in the process that calls it.

    Calls of all stages with the same arguments share one session of the process, on a thread of
    its own. The session opens with the first call and closes when the process ends, or with
    `close_sessions`. Threads may call a stage at the same time.

    It can be pickled. Explicit credentials would be readable in the pickle, so pickling them raises
    unless ``pickle_credentials`` is true.

    Attributes:
        to_request: Builds a request from an item, such as ``Captioning``.
        credentials: See `Credentials`. Default: the worker's environment.
        settings: See `Settings`. Each process has its own permits.
        ledger: What the workers share, such as a `RedisLedger`.
        key: See `AnalyzeSession.map`.
        notifications: A `NotificationSource` that pickles, such as `RedisNotifications`.
        notification_url: See `AnalyzeSession`.
        mode: See `AnalyzeSession.map`.
        pickle_credentials: Whether a pickle may contain the credentials.

    Raises:
        ConfigurationError: An argument is invalid.
    """

    to_request: Callable[[Item], AnalyzeRequest[A]]
    credentials: Credentials | None = attrs.field(default=None, kw_only=True, repr=False)
    settings: Settings = attrs.field(factory=Settings, kw_only=True)
    ledger: Ledger | None = attrs.field(default=None, kw_only=True)
    key: Callable[[Item], str] | None = attrs.field(default=None, kw_only=True)
    notifications: NotificationSource | None = attrs.field(default=None, kw_only=True)
    notification_url: str | None = attrs.field(default=None, kw_only=True)
    mode: Mode = attrs.field(default="call", kw_only=True)
    pickle_credentials: bool = attrs.field(default=False, kw_only=True)

    def __attrs_post_init__(self) -> None:
        if not callable(self.to_request):
            raise ConfigurationError(
                "`to_request` must be a request class such as Captioning, or a function that "
                f"builds a request from an item; not {self.to_request!r:.80}."
            )
        if isinstance(self.notifications, asyncio.Queue):
            raise ConfigurationError(
                "A stage cannot read an asyncio.Queue: its session runs in other processes. Pass "
                "RedisNotifications, or another source that pickles."
            )

    def __reduce__(self) -> tuple[Any, ...]:
        if self.credentials is not None and not self.pickle_credentials:
            raise TypeError(
                "This stage has explicit credentials, which anybody could read in its pickle. Set "
                "CLOUDINARY_URL in the workers instead, or pass pickle_credentials=True."
            )
        names = [field.name for field in attrs.fields(AnalyzeStage)[1:]]
        options = {name: getattr(self, name) for name in names}
        return partial(AnalyzeStage, self.to_request, **options), ()

    def __call__(self, items: Iterable[Item]) -> list[Outcome[Item, A]]:
        """Analyze items, and return an outcome for each, in their order. Blocks.

        An error that stops bulk work (an exhausted quota, refused credentials, a lost ledger) does
        not raise. The items that are no longer sent are `Failed` with `BulkStoppedError`, unless
        the ledger has their response or permanent error.

        Raises:
            ConfigurationError: Missing credentials, or an invalid argument. Nothing was sent.
            LedgerError: The ledger could not be opened. Nothing was sent.
        """
        host = _find_host()
        running = host.run(self._analyze(host, list(items)))
        try:
            return running.result()
        except BaseException:
            running.cancel()  # for example, a KeyboardInterrupt
            raise

    async def acall(self, items: Iterable[Item]) -> list[Outcome[Item, A]]:
        """Analyze items, as `__call__` does, on any event loop. Cancelling is safe."""
        host = _find_host()
        return await asyncio.wrap_future(host.run(self._analyze(host, list(items))))

    async def _analyze(self, host: _Host, items: list[Item]) -> list[Outcome[Item, A]]:
        opened = await host.open(self)
        outcomes: list[Outcome[Item, A] | None] = [None] * len(items)
        stop: BulkStoppedError | None = None
        options: dict[str, Any] = {"mode": self.mode, "ledger": opened.ledger, "key": self.key}
        try:
            async with opened.session.map(items, self.to_request, **options) as stream:
                async for outcome in stream:
                    outcomes[outcome.index] = outcome
        except BulkStoppedError as error:
            stop = error
        return [
            await self._look_up(opened, index, items[index], stop) if outcome is None else outcome
            for index, outcome in enumerate(outcomes)
        ]

    async def _look_up(
        self, opened: _Opened, index: int, item: Item, stop: BulkStoppedError | None
    ) -> Outcome[Item, A]:
        """Return the ledger's outcome for an item that the stream did not reach."""
        request: AnalyzeRequest[A] | None = None
        restored, seconds = False, 0.0
        error: Exception = stop or BulkStoppedError("The stream ended early. Not sent.")
        try:
            request = self.to_request(item)
            if opened.ledger is not None:
                named = None if self.key is None else self.key(item)
                key = request.key if named is None else KeyBuilder(request).build_named(named)
                record = await opened.ledger.find(key)
                if record is not None and record.final:
                    restored, seconds = True, record.seconds or 0.0
                    if record.response is not None:
                        return Answered(
                            item=item,
                            index=index,
                            request=request,
                            response=Response.from_raw(request, record.response),
                            restored=True,
                            seconds=seconds,
                        )
                    assert record.error is not None
                    error = record.error
        except Exception as raised:  # an error of the user's functions, or of the ledger
            if request is None or restored:
                error = raised
        return Failed(
            item=item, index=index, request=request, error=error, restored=restored, seconds=seconds
        )

    def _identify(self) -> bytes:
        """Return a key that is equal for stages that share a session."""
        digest = hashlib.sha256()
        for name in ("credentials", "settings", "ledger", "notifications", "notification_url"):
            value = getattr(self, name)
            try:
                digest.update(pickle.dumps(value))
            except Exception:  # it cannot be pickled, so its identity is its key
                digest.update(str(id(value)).encode())
            digest.update(b"|")
        return digest.digest()


@attrs.define(eq=False, repr=False)
class _Opened:
    """The session that stages with the same arguments share in a process."""

    stage: AnalyzeStage[Any, Any]  # keeps the objects alive that are identified by their `id`
    session: AnalyzeSession
    ledger: Ledger | None
    parts: Sequence[Any]

    async def aclose(self) -> None:
        for part in (self.session, *self.parts):
            if hasattr(part, "aclose"):
                try:
                    await part.aclose()
                except Exception as error:
                    logger.warning(
                        "%s could not be closed (%s).", type(part).__name__, describe(error)
                    )

    def describe(self) -> dict[str, Any]:
        counts = attrs.asdict(self.session.stats)
        return {"host": socket.gethostname(), "pid": os.getpid(), **counts}


def _copy(value: T) -> T:
    """Return a copy for the loop of the host. An object that cannot be copied is used itself."""
    try:
        return copy.copy(value)
    except TypeError:
        return value


@attrs.define(eq=False, repr=False)
class _Host:
    """The thread of a process whose event loop runs its sessions.

    A forked process starts another thread when it needs one, and leaves the parent's alone.
    """

    loop: asyncio.AbstractEventLoop = attrs.field(factory=asyncio.new_event_loop)
    thread: threading.Thread = attrs.field(init=False)
    opened: dict[bytes, asyncio.Task[_Opened]] = attrs.field(factory=dict)

    def start(self) -> None:
        self.thread = threading.Thread(
            target=self.loop.run_forever, name="cloudinary-analyze", daemon=True
        )
        self.thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        if threading.current_thread() is self.thread:
            coroutine.close()
            raise RuntimeError("A stage cannot be called by code that it calls itself.")
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop)

    async def open(self, stage: AnalyzeStage[Any, Any]) -> _Opened:
        identity = stage._identify()  # noqa: SLF001 -- of this module
        opening = self.opened.get(identity)
        if opening is None:
            opening = self.opened[identity] = self.loop.create_task(_open(stage))
        try:
            return await asyncio.shield(opening)
        except BaseException:
            if opening.done() and (opening.cancelled() or opening.exception() is not None):
                self.opened.pop(identity, None)
            raise

    async def aclose(self) -> None:
        while self.opened:
            _, opening = self.opened.popitem()
            await asyncio.wait([opening])
            if not opening.cancelled() and opening.exception() is None:
                await opening.result().aclose()

    def stop(self) -> None:
        try:
            self.run(self.aclose()).result(CLOSE_SECONDS)
        finally:
            self.loop.call_soon_threadsafe(self.loop.stop)
            self.thread.join(CLOSE_SECONDS)
            if not self.thread.is_alive():
                self.loop.close()


async def _open(stage: AnalyzeStage[Any, Any]) -> _Opened:
    settings, pacer = stage.settings, _copy(stage.settings.pacer)
    ledger, notifications = _copy(stage.ledger), _copy(stage.notifications)
    session = await asyncio.to_thread(  # the first one imports aiohttp
        AnalyzeSession,
        stage.credentials,
        settings=settings if pacer is None else attrs.evolve(settings, pacer=pacer),
        notifications=notifications,
        notification_url=stage.notification_url,
    )
    opened = _Opened(stage, session, ledger, (notifications, ledger, pacer))
    if callable(describe := getattr(ledger, "describe", None)):
        describe(opened.describe)
    await session.__aenter__()
    return opened


_host: _Host | None = None
_lock = threading.Lock()
_abandoned: Final[list[_Host | None]] = []  # closing them could disturb the parent


def _find_host() -> _Host:
    global _host  # noqa: PLW0603 -- one for each process
    with _lock:
        if _host is None:
            from multiprocessing.util import Finalize

            # not atexit, which the children of a pool skip
            Finalize(None, close_sessions, exitpriority=10)
            _host = _Host()
            _host.start()
        return _host


def _forget_host() -> None:
    global _host, _lock
    _abandoned.append(_host)
    _host, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_host)


def close_sessions() -> None:
    """Close the sessions of all stages of this process. Idempotent. A later call opens them again.

    Called automatically when a process ends normally. Items in flight in other threads are stopped.
    """
    global _host
    with _lock:
        host, _host = _host, None
    if host is not None:
        host.stop()


def worker_stats(ledger: Ledger | None = None) -> list[dict[str, Any]]:
    """Return the statistics of running workers: their names and `SessionStats`.

    Args:
        ledger: A `RedisLedger`, for the statistics of all its workers, from any process. Default:
            the sessions of this process.

    Raises:
        ConfigurationError: The ledger does not know its workers.
        LedgerError: The ledger cannot be read.
    """
    if ledger is not None:
        if not hasattr(ledger, "worker_stats"):
            raise ConfigurationError(f"A {type(ledger).__name__} does not know its workers.")
        found: list[dict[str, Any]] = cast("Any", ledger).worker_stats()
        return found
    host = _host
    tasks = [] if host is None else list(host.opened.values())
    return [
        task.result().describe()
        for task in tasks
        if task.done() and not task.cancelled() and task.exception() is None
    ]


def outcome_columns(outcomes: Iterable[AnyOutcome]) -> dict[str, list[Any]]:
    """Return outcomes as the columns (`COLUMNS`) of a table for pandas, Arrow or Polars.

    ``status`` is ``"answered"``, ``"failed"`` or ``"stopped"``. A stopped item has no response
    because of an error that concerns more than itself, such as an exhausted quota. Run the same job
    again to get it. The other columns are those of the exported tables.
    """
    rows = [_build_row(outcome) for outcome in outcomes]
    return {name: [row[name] for row in rows] for name in COLUMNS}


def _build_row(outcome: AnyOutcome) -> dict[str, Any]:
    row = build_row(build_record(outcome))
    status, error = "answered", outcome.error
    if error is not None:
        stopped = isinstance(error, BulkStoppedError) or (
            not outcome.restored
            and isinstance(error, AnalyzeError)
            and find_stop(error, Settings()) is not None
        )
        status = "stopped" if stopped else "failed"
    return {**row, "status": status, "restored": outcome.restored}


def __getattr__(name: str) -> Any:
    """Build ``SCHEMA`` (of Arrow) and ``META`` (an empty pandas table) on first access."""
    if name == "SCHEMA":
        arrow = _import("pyarrow", "pip install 'cloudinary-analyze[parquet]'")
        kinds = {
            int: arrow.int64(),
            float: arrow.float64(),
            bool: arrow.bool_(),
            str: arrow.string(),
        }
        return arrow.schema([(column, kinds[kind]) for column, kind in COLUMNS.items()])
    if name == "META":
        pandas = _import("pandas", "pip install pandas")
        kinds = {int: "Int64", float: "float64", bool: "boolean", str: "string"}
        return pandas.DataFrame(
            {column: pandas.Series([], dtype=kinds[kind]) for column, kind in COLUMNS.items()}
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _import(name: str, line: str) -> Any:
    try:
        return import_module(name)  # imported by name, because it may have no types
    except ModuleNotFoundError as error:
        raise ConfigurationError(f"{error.name} is not installed: {line}") from None
