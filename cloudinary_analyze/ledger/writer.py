"""The writing side of a SQLite ledger: a thread that performs many steps per commit.

The states of a `Writer`:

| state   | `begun` | `trouble` | `failure` | records                                           |
|---------|---------|-----------|-----------|---------------------------------------------------|
| opening | no      | None      | None      | -                                                 |
| writing | yes     | None      | None      | become durable                                    |
| blocked | yes     | set       | None      | wait in memory; writing is tried until `patience` |
| failed  | any     | any       | set       | stay in memory, for `rescue`                      |

A closed writer first writes what waits, for up to `patience`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

import attrs

from cloudinary_analyze._clock import wake
from cloudinary_analyze.errors import LONGEST_MESSAGE, LedgerError, shorten
from cloudinary_analyze.ledger.file import (
    ANSWERED,
    FAILED,
    OPEN,
    SUBMITTED,
    Witness,
    connect_for_reading,
    connect_for_writing,
    create,
    explain,
    explaining,
    lock,
    may_pass,
    verify,
)
from cloudinary_analyze.ledger.items import take_record, write_stream_item

GATHERING: Final = 0.02  # seconds that a commit waits for further records
RETRY_INTERVAL: Final = 0.25  # seconds between two tries while the ledger cannot be written

logger: logging.Logger = logging.getLogger("cloudinary_analyze.ledger")

Step = Callable[[sqlite3.Connection], object]


def write_task(connection: sqlite3.Connection, key: bytes, task_id: str | None) -> None:
    """Note or remove the task of a key, unless the key has a final response or error."""
    record, state = take_record(connection, key)
    if state <= SUBMITTED:
        connection.execute(
            "UPDATE records SET state = ?, task_id = ? WHERE id = ?",
            (OPEN if task_id is None else SUBMITTED, task_id, record),
        )


def write_answer(
    connection: sqlite3.Connection,
    key: bytes,
    state: int,
    content: bytes,
    *,
    seconds: float,
    recorded: float,
) -> None:
    """Note a final response or error. An error never replaces a response."""
    query = "UPDATE records SET state = ?, seconds = ?, recorded = ? WHERE key = ?"
    if state == FAILED:
        query += f" AND state != {ANSWERED}"
    arguments = (state, seconds, recorded, key)
    if not connection.execute(query, arguments).rowcount:
        _, known = take_record(connection, key)
        if known == ANSWERED:
            return
        connection.execute(query, arguments)
    query = "INSERT OR REPLACE INTO answers SELECT id, ? FROM records WHERE key = ?"
    connection.execute(query, (content, key))


def write_source(connection: sqlite3.Connection, key: bytes, source: str) -> None:
    """Note the source that a key names."""
    record, _ = take_record(connection, key)
    connection.execute("INSERT OR REPLACE INTO named VALUES (?, ?)", (record, source))


def copy_records(connection: sqlite3.Connection, path: Path) -> None:
    """Copy the tasks, responses and final errors of another ledger, and the items that have one."""
    query = (
        "SELECT key, state, task_id, content, seconds, recorded, source FROM records "
        "LEFT JOIN answers ON answers.record = records.id "
        "LEFT JOIN named ON named.record = records.id"
    )
    with contextlib.closing(connect_for_reading(path)) as other:
        for key, state, task_id, content, seconds, recorded, source in other.execute(query):
            if source is not None:
                write_source(connection, key, source)
            if task_id is not None:
                write_task(connection, key, task_id)
            if content is not None:
                write_answer(connection, key, state, content, seconds=seconds, recorded=recorded)
        items = other.execute(
            "SELECT key, position, source, model FROM items "
            "JOIN records ON records.id = items.record ORDER BY position"
        )
        for key, position, source, model in items:
            write_stream_item(connection, key, position=position, source=source, model=model)


def delete_errors(connection: sqlite3.Connection) -> None:
    """Delete the final errors."""
    connection.execute(
        "DELETE FROM answers WHERE record IN (SELECT id FROM records WHERE state = ?)", (FAILED,)
    )
    connection.execute(
        "UPDATE records SET state = ?, task_id = NULL, seconds = NULL WHERE state = ?",
        (OPEN, FAILED),
    )


@attrs.frozen
class Entry:
    """A step that waits to be written, and the future of its waiter."""

    step: Step
    key: bytes | None = None
    future: asyncio.Future[LedgerError | None] | None = None


@attrs.define(eq=False)
class Writer:
    """The writing part of a ledger. It does not refer to the ledger, so dropping a ledger stops it.

    `run` and what it calls belong to the thread, everything else to the loop. See the module's
    docstring for the states.

    Attributes:
        path: The file.
        owner: Base URL and cloud name.
        loop: The loop that it belongs to.
        patience: Seconds that it keeps trying while the file is locked or the disk is full.
        ready: Done once the file is open, or cannot be.
        ended: Done once the file is closed.
        begun: Whether the file was opened.
        unwritten: The latest entry of each key that is not durable yet.
        trouble: The error because of which nothing can be written at the moment.
        failure: The error because of which nothing can be written any more.
        raised: Whether `failure` was raised.
    """

    path: Path
    owner: tuple[str, str]
    loop: asyncio.AbstractEventLoop
    patience: float
    ready: asyncio.Future[None] = attrs.field(init=False)
    ended: asyncio.Future[None] = attrs.field(init=False)
    begun: bool = False
    unwritten: dict[bytes, Entry] = attrs.field(factory=dict)
    trouble: LedgerError | None = None
    failure: LedgerError | None = None
    raised: bool = False
    _troubled_since: float = 0.0
    _waiting: deque[Entry] = attrs.field(factory=deque)
    _wanted: threading.Event = attrs.field(factory=threading.Event)
    _stopping: threading.Event = attrs.field(factory=threading.Event)

    def __attrs_post_init__(self) -> None:
        self.ready = self.loop.create_future()
        self.ended = self.loop.create_future()

    @property
    def backlog(self) -> int:
        """The number of steps that wait to be written."""
        return len(self._waiting)

    def check(self) -> None:
        """Raise the failure, if there is one."""
        if self.failure is not None:
            raise self.build_failure()

    def build_failure(self) -> LedgerError:
        """Return a copy of the failure, because many may raise it."""
        assert self.failure is not None
        self.raised = True
        error = LedgerError(self.failure.message)
        error.__cause__ = self.failure.__cause__
        return error

    def put(self, entry: Entry) -> None:
        """Queue a step for the next commit.

        Raises:
            LedgerError: The writer has failed. The step is kept for `rescue`.
        """
        self._waiting.append(entry)
        self.check()
        if entry.key is not None:
            self.unwritten[entry.key] = entry
        if not self._wanted.is_set():
            self._wanted.set()

    async def perform(self, step: Step, *, key: bytes | None = None) -> None:
        """Return once a step is durable. Cancelling the wait does not cancel the step."""
        future: asyncio.Future[LedgerError | None] = self.loop.create_future()
        self.put(Entry(step, key, future))
        if await future is not None:
            raise self.build_failure()

    def stop(self) -> None:
        """Write what waits, and end."""
        self._stopping.set()
        self._wanted.set()

    def run(self) -> None:
        """Open the file, write until stopped or broken, close it."""
        held: list[sqlite3.Connection] = []
        try:
            with explaining(self.path):
                witness = self._begin(held)
            self.begun = True
            self._call_back(wake, self.ready)
            while not self._stopping.is_set() or self._waiting:
                self._wanted.wait()
                self._stopping.wait(GATHERING)  # sleeps, unless there is no time to
                self._wanted.clear()
                if not self._write(held[-1], witness):
                    time.sleep(RETRY_INTERVAL)
                    self._wanted.set()
        except LedgerError as error:
            self.failure = error
        except Exception as error:
            self.failure = explain(error, self.path)
            self.failure.__cause__ = error
        finally:
            for connection in reversed(held):
                connection.close()
            self._call_back(self._end)

    def _begin(self, held: list[sqlite3.Connection]) -> Witness:
        exists = verify(self.path, *self.owner)
        held.append(lock(self.path))
        if not exists and not verify(self.path, *self.owner):
            create(self.path, *self.owner)
        held.append(connect_for_writing(self.path))
        return Witness(self.path)

    def _write(self, connection: sqlite3.Connection, witness: Witness) -> bool:
        """Perform all waiting steps. Return ``False`` if that must be tried again."""
        entries = [self._waiting.popleft() for _ in range(len(self._waiting))]
        if not entries:
            return True
        try:
            with explaining(self.path):
                connection.execute("BEGIN IMMEDIATE")
                for entry in entries:
                    entry.step(connection)
                connection.execute("COMMIT")
            witness.check()
        except BaseException as error:
            self._waiting.extendleft(reversed(entries))
            if isinstance(error, LedgerError) and self._may_try_again(error):
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                return False
            raise
        if self.trouble is not None:
            self.trouble = None
            logger.warning(
                "The ledger %s can be written again.", shorten(str(self.path), LONGEST_MESSAGE)
            )
        self._call_back(self._acknowledge, entries, None)
        return True

    def _may_try_again(self, error: LedgerError) -> bool:
        if not may_pass(error):
            return False
        now = time.monotonic()
        if self.trouble is None:
            self._troubled_since = now
            logger.warning(
                "%s No further request is sent until it can be written, for up to %.0f s.",
                error.message,
                self.patience,
            )
        self.trouble = error
        return now - self._troubled_since < self.patience

    def rescue(self, path: Path) -> int:
        """Perform the failed steps on another ledger, which is created if necessary.

        Returns:
            The number of tasks, responses and final errors. If it is 0, no file is created.

        Raises:
            LedgerError: It cannot be written either.
        """
        entries = [self._waiting[index] for index in range(len(self._waiting))]
        count = sum(entry.key is not None for entry in entries)
        if not count:
            return 0
        if not verify(path, *self.owner):
            create(path, *self.owner)
        with contextlib.closing(connect_for_writing(path)) as connection, explaining(path):
            connection.execute("BEGIN IMMEDIATE")
            for entry in entries:
                entry.step(connection)
            connection.execute("COMMIT")
        for _ in entries:
            self._waiting.popleft()
        return count

    def _call_back(self, callback: Callable[..., object], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed, so nothing waits any more
            self.loop.call_soon_threadsafe(callback, *arguments)

    def _acknowledge(self, entries: Iterable[Entry], failure: LedgerError | None) -> None:
        for entry in entries:
            if entry.key is not None and self.unwritten.get(entry.key) is entry:
                del self.unwritten[entry.key]
            if entry.future is not None and not entry.future.done():
                entry.future.set_result(failure)

    def _end(self) -> None:
        self._acknowledge(tuple(self._waiting), self.failure)
        wake(self.ready)
        wake(self.ended)
