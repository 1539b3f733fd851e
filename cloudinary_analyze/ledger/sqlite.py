"""`SQLiteLedger`: a ledger in one file, with the items of a run and their results.

The event loop's thread encodes and looks up. A second thread writes many records per commit. A
record that was awaited survives a kill and a power cut, if the disk keeps what it acknowledged.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Final

import attrs

from cloudinary_analyze._clock import SYSTEM_CLOCK
from cloudinary_analyze._values import Closable, NotPicklable, quote
from cloudinary_analyze._wire import codec
from cloudinary_analyze.errors import AnalyzeError, ConfigurationError, LedgerError
from cloudinary_analyze.ledger.encoding import dump_error, make_encodable
from cloudinary_analyze.ledger.file import (
    ANSWERED,
    FAILED,
    OPEN,
    SUBMITTED,
    connect_for_reading,
    explaining,
    verify,
)
from cloudinary_analyze.ledger.items import (
    Inventory,
    ItemRow,
    LedgerItem,
    RecordSet,
    copy_states,
    fetch,
    load_answer,
    read_answered,
    read_columns,
    read_items,
    read_noted,
    write_item,
    write_items,
    write_stream_item,
)
from cloudinary_analyze.ledger.writer import (
    Entry,
    Step,
    Writer,
    copy_records,
    delete_errors,
    write_answer,
    write_source,
    write_task,
)
from cloudinary_analyze.protocols import Claim, Ledger, LedgerRecord
from cloudinary_analyze.responses import JSONObject, Response

PATIENCE: Final = 20.0
BACKLOG: Final = 5000  # items that may wait to be written
READ_BATCH: Final = 500  # rows; no read lasts longer, as the log cannot be emptied meanwhile

_DONE: Final = frozenset({ANSWERED, FAILED})


@attrs.frozen(kw_only=True)
class LedgerCounts:
    """The number of entries in a ledger.

    Attributes:
        answered: Request keys with a response.
        failed: Request keys with a final error.
        submitted: Request keys with a task in progress.
        items: Items of the run.
    """

    answered: int
    failed: int
    submitted: int
    items: int


def build_row(
    *,
    source: str,
    line: int | None = None,
    model: str | None = None,
    key: str | None = None,
    file: str | None = None,
    name: str | None = None,
    columns: bytes | None = None,
    error: AnalyzeError | None = None,
) -> ItemRow:
    """Return the row of an item, for `SQLiteLedger.add_item`.

    Args:
        source: See `LedgerItem`, as for the other arguments.
        line: See `LedgerItem`.
        model: See `LedgerItem`.
        key: See `LedgerItem`.
        file: See `LedgerItem`.
        name: See `LedgerItem`.
        columns: The columns of the input, as a JSON object.
        error: Why no request could be built from the item.

    Raises:
        LedgerError: The key is not hexadecimal.
    """
    return (
        line,
        make_encodable(source),
        model,
        None if key is None else _pack(key),
        None if file is None else make_encodable(file),
        None if name is None else make_encodable(name),
        columns,
        None if error is None else dump_error(error),
    )


def _pack(key: str) -> bytes:
    try:
        return bytes.fromhex(key)
    except ValueError:
        raise LedgerError(
            f"A ledger's keys are hexadecimal, as AnalyzeRequest.key makes them, not {key!r:.80}."
        ) from None


class SQLiteLedger(NotPicklable, Closable, Ledger):
    """A ledger in a SQLite file, for `AnalyzeSession.map`.

    Open it before the session, so that it closes last:

    ```python
    async with SQLiteLedger("run.ledger") as ledger, AnalyzeSession() as session:
        async for outcome in session.map(urls, Captioning, ledger=ledger):
            ...
    ```

    Running the same code again resumes the job, even after a crash. The file belongs to one host
    and cloud name, and has one writer at a time. It contains source URLs in full, query strings
    included. SQLite keeps ``-wal`` and ``-shm`` files next to it while it is open or after a kill;
    an empty ``-lock`` file stays. Reading (`iter_items`, `counts`) needs no `open` and does not
    affect a writer.

    While the file is locked by another process or the disk is full, nothing more is sent, and
    responses that arrive wait in memory until they can be written.

    An open ledger belongs to the event loop that opened it.

    Args:
        path: The file. Its directory must exist. A new file is readable by its owner only.
        patience: Seconds to keep trying to write while the file is locked or the disk is full or
            failing. Then the ledger fails: the stream yields the responses in memory, marked as
            `unrecorded <Answered.unrecorded>`, and stops. `rescue` saves them.

    Raises:
        ConfigurationError: ``patience`` is negative or not a number.

    Warns:
        ResourceWarning: It was dropped without being closed.
    """

    def __init__(self, path: str | os.PathLike[str], *, patience: float = PATIENCE) -> None:
        if not isinstance(patience, int | float) or not patience >= 0:
            raise ConfigurationError(
                f"`patience` must be a number of seconds from 0, not {quote(patience)}."
            )
        # SQLite keeps its files next to what a symbolic link names
        self._path = Path(path)
        if os.path.islink(self._path):  # noqa: PTH114 -- never raises
            self._path = Path(os.path.realpath(path))
        self._patience = patience
        self._writer: Writer | None = None
        self._reader: sqlite3.Connection | None = None

    def __repr__(self) -> str:
        return f"<SQLiteLedger {str(self._path)!r}, {'open' if self._writer else 'not open'}>"

    @property
    def path(self) -> Path:
        """The file."""
        return self._path

    @property
    def failed(self) -> bool:
        """Whether it is open and gave up writing; see `rescue`."""
        return self._writer is not None and self._writer.failure is not None

    def __del__(self, _warn: Callable[..., None] = warnings.warn) -> None:
        writer = getattr(self, "_writer", None)
        if writer is not None:
            writer.stop()
            if self._reader is not None:
                self._reader.close()
            _warn(
                f"{self!r} was dropped without being closed. Use `async with` or `aclose()`.",
                ResourceWarning,
                source=self,
            )

    async def open(self, *, base_url: str, cloud_name: str) -> None:
        """Open the file for writing, or create it. Idempotent. Cancelling is safe.

        Writes and deletes a record to check that records can be made durable. Reads a file of up to
        1 GiB that was closed in order, to check that it is intact.

        Args:
            base_url: ``scheme://host[:port]`` of the service.
            cloud_name: The product environment.

        Raises:
            LedgerError: It is damaged, not a ledger, of another host or cloud, or has another
                writer; it is unchanged. Or it cannot be written.
        """
        owner = (base_url, cloud_name)
        writer = self._writer
        if writer is None:
            loop = asyncio.get_running_loop()
            writer = self._writer = Writer(self._path, owner, loop, self._patience)
            threading.Thread(target=writer.run, name="ledger", daemon=True).start()
        elif writer.owner != owner:
            raise LedgerError(
                f"The ledger {self._path} is open for {writer.owner[1]} at {writer.owner[0]}, and "
                f"this session is of {cloud_name} at {base_url}. Use a ledger for each."
            )
        elif writer.loop is not asyncio.get_running_loop():
            raise LedgerError(
                f"The ledger {self._path} is open on another event loop. Close it there first."
            )
        await asyncio.wait([writer.ready])
        if writer.failure is not None and not writer.begun and self._writer is writer:
            self._writer = None  # it may be opened again, once the cause is gone
        writer.check()

    async def aclose(self) -> None:
        """Write everything noted, and close. Idempotent.

        Cancelling is safe: a thread still writes everything and closes the file.

        Raises:
            LedgerError: Something could not be written, and no other call has raised the error.
        """
        writer, self._writer = self._writer, None
        reader, self._reader = self._reader, None
        if reader is not None:
            reader.close()
        if writer is None:
            return
        writer.stop()
        await asyncio.wait([writer.ended])
        if not writer.raised:
            writer.check()

    async def claim(self, key: str) -> Claim | None:
        """See `Ledger.claim`. Denied while the file cannot be written.

        Raises:
            LedgerError: The file cannot be read, or the ledger is not open.
        """
        return None if self._use().trouble is not None else await super().claim(key)

    async def watch(self, key: str) -> None:  # noqa: ARG002 -- for any key
        """Return once the file can be written again. Cancelling is safe.

        Args:
            key: Any key; all wait for the same file.

        Raises:
            LedgerError: The file could not be written for ``patience`` seconds.
        """
        if self._use().trouble is not None:
            await self.flush()

    async def find(self, key: str) -> LedgerRecord | None:
        """Return what is known about a key, including everything recorded before the call.

        Takes some microseconds of the loop's time. Cancelling is safe.

        Raises:
            LedgerError: The file cannot be read, or the ledger is not open.
        """
        writer = self._use()
        packed = _pack(key)
        while packed in writer.unwritten:
            await self.flush()
        query = (
            "SELECT state, task_id, content, seconds, source AS noted FROM records "
            "LEFT JOIN answers ON answers.record = records.id "
            "LEFT JOIN named ON named.record = records.id WHERE key = ?"
        )
        row = next(iter(fetch(self._read(), self._path, query, packed)), None)
        if row is None or row[0] == OPEN:
            return None
        state, task_id, content, seconds, source = row
        response, error = load_answer(state, content, self._path)
        return LedgerRecord(
            key=key,
            task_id=task_id,
            response=response,
            error=error,
            seconds=seconds,
            source=source,
        )

    async def record_submitted(self, key: str, task_id: str | None) -> None:
        """See `Ledger.record_submitted`.

        Raises:
            LedgerError: It could not be written.
        """
        packed = _pack(key)
        await self._record(packed, partial(write_task, key=packed, task_id=task_id))

    async def record_response(self, key: str, response: Response[Any], *, seconds: float) -> None:
        """See `Ledger.record_response`.

        Raises:
            LedgerError: It could not be written.
        """
        await self._record_answer(_pack(key), ANSWERED, codec.dumps(dict(response.raw)), seconds)

    async def record_error(self, key: str, error: AnalyzeError, *, seconds: float) -> None:
        """See `Ledger.record_error`.

        Raises:
            LedgerError: It could not be written.
        """
        await self._record_answer(_pack(key), FAILED, dump_error(error), seconds)

    async def note_source(self, key: str, source: str) -> None:
        """See `Ledger.note_source`.

        Raises:
            LedgerError: Something could not be written.
        """
        await self._note(partial(write_source, key=_pack(key), source=make_encodable(source)))

    async def note_item(self, key: str, *, source: str, model: str, index: int) -> None:
        """See `Ledger.note_item`. Items of several streams are kept one after the other.

        Raises:
            LedgerError: Something could not be written.
        """
        await self._note(
            partial(
                write_stream_item,
                key=_pack(key),
                position=index,
                source=make_encodable(source),
                model=model,
            )
        )

    async def add_item(self, index: int, row: ItemRow) -> None:
        """Note an item of the run. It replaces an earlier item with the same index.

        Returns before the item is durable. The next record that is durable includes it. Waits only
        while more than 5,000 entries are unwritten. Cancelling is safe: the item is noted.

        Args:
            index: See `LedgerItem`.
            row: See `build_row`.

        Raises:
            LedgerError: Something could not be written.
        """
        await self._note(lambda connection: write_item(connection, index, row))

    async def add_error(self, index: int, error: AnalyzeError) -> None:
        """Note why the request of an item failed for a transient reason.

        Returns before the error is durable and can be cancelled, as `add_item`. A recorded response
        takes precedence.

        Args:
            index: See `LedgerItem`.
            error: The error.

        Raises:
            LedgerError: Something could not be written.
        """
        content = dump_error(error)
        await self._note(
            lambda connection: connection.execute(
                "UPDATE items SET error = ? WHERE position = ?", (content, index)
            )
        )

    async def replace_items(self, read_rows: Callable[[], Iterable[ItemRow]]) -> Inventory:
        """Replace the items of the run, all or none. Results are kept.

        Cancelling the wait does not stop the replacement.

        Args:
            read_rows: Returns an iterable of the new items, in the order of the run; see
                `build_row`. Called in the ledger's thread, and called again if the ledger was
                locked or the disk was full.

        Returns:
            The counts of the new items.

        Raises:
            LedgerError: Something could not be written.
            Exception: The error that ``read_rows`` raised. The items are unchanged.
        """
        outcome: list[Inventory | Exception] = []

        def replace(connection: sqlite3.Connection) -> None:
            outcome.clear()
            connection.execute("SAVEPOINT replacing")
            try:
                outcome.append(write_items(connection, read_rows(), self._path))
            except (sqlite3.Error, LedgerError):
                raise
            except Exception as error:
                outcome.append(error)
                connection.execute("ROLLBACK TO replacing")
            connection.execute("RELEASE replacing")

        await self._use().perform(replace)
        (result,) = outcome
        if isinstance(result, Exception):
            raise result
        return result

    async def _note(self, step: Step) -> None:
        writer = self._use()
        writer.put(Entry(step))
        if writer.backlog > BACKLOG:
            await self.flush()

    async def forget_errors(self) -> None:
        """Delete the final errors, so that their requests are sent again.

        Cancelling the wait does not stop the deletion.

        Raises:
            LedgerError: Something could not be written.
        """
        await self._use().perform(delete_errors)

    async def flush(self) -> None:
        """Return once everything noted so far is durable. Cancelling is safe.

        Raises:
            LedgerError: Something could not be written.
        """
        await self._use().perform(lambda _: None)

    async def absorb(self, path: str | os.PathLike[str]) -> None:
        """Copy the tasks, responses and final errors of another ledger, such as a rescued one.

        Cancelling the wait does not stop the copy.

        Args:
            path: The file of the other ledger. It is not changed.

        Raises:
            LedgerError: The other ledger cannot be read or belongs to another host or cloud, or
                something could not be written.
        """
        writer, other = self._use(), Path(path)
        if verify(other, *writer.owner):
            await writer.perform(partial(copy_records, path=other))

    async def copy_states(self, path: str | os.PathLike[str]) -> None:
        """Copy the state of every key of another ledger into this new one, without the responses.

        Cancelling the wait does not stop the copy.

        Args:
            path: The file of the other ledger. It is not changed.

        Raises:
            LedgerError: The other ledger cannot be read or belongs to another host or cloud, or
                something could not be written.
        """
        writer, other = self._use(), Path(path)
        if verify(other, *writer.owner):
            await writer.perform(partial(copy_states, path=other))

    def rescue(self, path: str | os.PathLike[str]) -> int:
        """Write the records that could not be written into another ledger, for `absorb`.

        Call it after the ledger failed and before `aclose`. It blocks; call it in a thread.

        Args:
            path: The other file, on another disk. It is created if it does not exist.

        Returns:
            The number of tasks, responses and final errors written.

        Raises:
            LedgerError: It cannot be written either; or this one did not fail.
        """
        writer = self._writer
        if writer is None or writer.failure is None:
            raise LedgerError(f"Nothing failed: the ledger {self._path} holds its records itself.")
        return writer.rescue(Path(path))

    def counts(self) -> LedgerCounts:
        """Count what is durable; reads through all records.

        Raises:
            LedgerError: The ledger does not exist or cannot be read.
        """
        with closing(connect_for_reading(self._path)) as connection, explaining(self._path):
            states = dict(connection.execute("SELECT state, count(*) FROM records GROUP BY state"))
            ((items,),) = connection.execute("SELECT count(*) FROM items")
        return LedgerCounts(
            answered=states.get(ANSWERED, 0),
            failed=states.get(FAILED, 0),
            submitted=states.get(SUBMITTED, 0),
            items=items,
        )

    def answered_items(self) -> RecordSet:
        """Return the records of the items that have a response or a final error.

        Raises:
            LedgerError: The ledger does not exist or cannot be read.
        """
        return read_answered(self._path)

    def iter_items(self) -> Iterator[LedgerItem]:
        """Yield every item of the run once, in order, with its durable response or error.

        Raises:
            LedgerError: The ledger does not exist or cannot be read.
        """
        return read_items(self._path)

    def iter_columns(self) -> Iterator[JSONObject]:
        """Yield the columns of the input that were kept for each item.

        Raises:
            LedgerError: The ledger does not exist or cannot be read.
        """
        return read_columns(self._path)

    def iter_noted(self, *, open_only: bool) -> Iterator[LedgerItem]:
        """Yield the items without their responses. For one thread.

        Items come in order. With ``open_only``, the first item of each model precedes all others.

        Args:
            open_only: Whether to leave out items without a request, and items that have a response
                or a final error.

        Raises:
            LedgerError: The ledger does not exist or cannot be read.
        """
        return read_noted(self._path, open_only=open_only)

    async def _record_answer(self, key: bytes, state: int, content: bytes, seconds: float) -> None:
        step = partial(
            write_answer,
            key=key,
            state=state,
            content=content,
            seconds=seconds,
            recorded=SYSTEM_CLOCK.wall(),
        )
        await self._record(key, step)

    async def _record(self, key: bytes, step: Step) -> None:
        await self._use().perform(step, key=key)

    def _use(self) -> Writer:
        writer = self._writer
        if writer is None or not writer.begun:
            raise LedgerError(
                f"The ledger {self._path} is not open. A session's map() opens it, and it must "
                "stay open until the session is closed: put its `async with` before the session's."
            )
        writer.check()
        return writer

    def _read(self) -> sqlite3.Connection:
        if self._reader is None:
            self._reader = connect_for_reading(self._path)
        return self._reader
