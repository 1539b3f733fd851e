"""The file of a SQLite ledger: its schema, its owner, its only writer, and its failures.

This module handles files and connections, not requests. Every failure is a `LedgerError`. A file
that is refused is never written to, because it is read through read-only connections.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cloudinary_analyze._clock import SYSTEM_CLOCK
from cloudinary_analyze.errors import LedgerError, shorten

APPLICATION_ID: Final = 0x434C4441
VERSION: Final = 3
OPEN: Final = 0  # the request of an item, not submitted yet
SUBMITTED: Final = 1
ANSWERED: Final = 2
FAILED: Final = 3
COMPANIONS: Final = ("-wal", "-shm", "-journal", "-lock", "-new")  # suffixes of files next to it
LARGEST_CHECKED: Final = 2**30  # bytes up to which a file is checked completely when it is opened
READ_CACHE: Final = 16  # MiB of pages
PROBE: Final = 2**16  # bytes of a record that is written and deleted as a check
PASSING: Final = ("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_FULL", "SQLITE_IOERR")
BUSY_TIMEOUT: Final = 1.0  # seconds that SQLite waits for a lock

# An item refers to its record by number. So resuming a run reads both tables in order and searches
# no keys. Large contents are in `answers`.
_SCHEMA: Final = f"""
PRAGMA journal_mode = DELETE;
PRAGMA synchronous = FULL;
BEGIN;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {VERSION};
CREATE TABLE owner (base_url TEXT NOT NULL, cloud_name TEXT NOT NULL, begun REAL NOT NULL);
CREATE TABLE records (
    id INTEGER PRIMARY KEY,
    key BLOB NOT NULL UNIQUE,
    state INTEGER NOT NULL,
    task_id TEXT,
    seconds REAL,
    recorded REAL
);
CREATE TABLE named (record INTEGER PRIMARY KEY REFERENCES records, source TEXT NOT NULL);
CREATE TABLE answers (record INTEGER PRIMARY KEY REFERENCES records, content BLOB NOT NULL);
CREATE TABLE items (
    position INTEGER PRIMARY KEY,
    line INTEGER,
    source TEXT NOT NULL,
    model TEXT,
    record INTEGER REFERENCES records,
    error BLOB,
    file TEXT,
    name TEXT,
    columns BLOB
);
"""


def _name_error(error: BaseException | None) -> str:
    return getattr(error, "sqlite_errorname", None) or type(error).__name__


def may_pass(error: LedgerError) -> bool:
    """Whether another write may succeed soon: the file was locked, or the disk full or failing."""
    return _name_error(error.__cause__).startswith(PASSING)


def explain(error: Exception, path: Path) -> LedgerError:
    """Return the message for an error of SQLite or the file system."""
    name = _name_error(error)
    kept = "Existing records are intact."
    if name == "SQLITE_FULL":
        what = f"cannot grow: the disk is full, or a limit on its size is reached. {kept} "
        what += "Free some space and run again."
    elif name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB", "UnicodeDecodeError")):
        what = "is damaged, or not a ledger. Restore it from a copy, or move it away."
    elif name.startswith(("SQLITE_READONLY", "SQLITE_PERM", "PermissionError")):
        what = "is not writable. Check the permissions of the file and its directory."
    elif name.startswith("SQLITE_CANTOPEN"):
        what = "cannot be opened. Check that its directory exists and is writable."
    elif name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
        what = f"is in use by another process. {kept} Wait until it ends, or use another path."
    elif name.startswith("SQLITE_IOERR"):
        what = f"cannot be read or written: the disk or its file system failed. {kept}"
    else:
        what = "cannot be used."
    return LedgerError(f"The ledger {path} {what} ({name}: {shorten(str(error))})")


@contextlib.contextmanager
def explaining(path: Path) -> Iterator[None]:
    """Convert errors of SQLite and the file system to `LedgerError`."""
    try:
        yield
    except (sqlite3.Error, OSError, UnicodeDecodeError) as error:
        raise explain(error, path) from error


def find_companion(path: Path, suffix: str) -> Path:
    """Return the path of a file next to the ledger, with links resolved."""
    path = Path(os.path.realpath(path))
    return path.with_name(path.name + suffix)


def _connect(path: Path, options: str, *, any_thread: bool = False) -> sqlite3.Connection:
    return sqlite3.connect(
        f"{path.absolute().as_uri()}?{options}",
        uri=True,
        isolation_level=None,
        timeout=BUSY_TIMEOUT,
        check_same_thread=not any_thread,
    )


def connect_for_reading(path: Path, *, any_thread: bool = False) -> sqlite3.Connection:
    """Open a ledger for reading, also while it is written.

    Args:
        path: The ledger.
        any_thread: Whether threads may use the connection one after the other.

    Raises:
        LedgerError: The ledger does not exist or cannot be read.
    """
    with explaining(path):
        if not path.exists():
            raise LedgerError(f"The ledger {path} does not exist.")
        if _is_new(path):
            raise LedgerError(f"The ledger {path} is empty. It holds no records.")
        connection = _connect(path, "mode=ro", any_thread=any_thread)
    try:
        with explaining(path):
            connection.execute(f"PRAGMA cache_size = -{READ_CACHE * 1024}")
            _check_kind(connection, path)
    except BaseException:
        connection.close()
        raise
    return connection


def _check_kind(connection: sqlite3.Connection, path: Path) -> None:
    ((application_id,),) = connection.execute("PRAGMA application_id")
    ((version,),) = connection.execute("PRAGMA user_version")
    if application_id != APPLICATION_ID:
        raise LedgerError(
            f"{path} is a database, but not a ledger. It is unchanged. Choose another path."
        )
    if version != VERSION:
        raise LedgerError(
            f"The ledger {path} has format {version}, but this version of the package writes "
            f"{VERSION}. It is unchanged. Use the version that made it, or another path."
        )


def _is_new(path: Path) -> bool:
    try:
        return path.stat().st_size == 0
    except FileNotFoundError:
        return True


def verify(path: Path, base_url: str, cloud_name: str) -> bool:
    """Check a file without changing it.

    Returns:
        Whether it is a ledger of this host and cloud. ``False`` if it does not exist yet.

    Raises:
        LedgerError: It is not a ledger, damaged, or of another host or cloud.
    """
    with explaining(path):
        if _is_new(path):
            _check_remains(path)
            return False
        if not path.is_file():
            raise LedgerError(f"{path} is not a file. Choose another path for the ledger.")
        settled = _is_new(find_companion(path, "-wal"))
        # with a log, the file alone may be in the middle of a checkpoint
        options = "mode=ro&immutable=1" if settled else "mode=ro"
        with contextlib.closing(_connect(path, options)) as connection:
            _check_kind(connection, path)
            rows = connection.execute("SELECT base_url, cloud_name FROM owner").fetchall()
            if settled:
                _check_pages(connection, path)
    if rows != [(base_url, cloud_name)]:
        theirs = "an unknown cloud"
        if rows:
            theirs = " at ".join(shorten(str(part)) for part in reversed(rows[0]))
        raise LedgerError(
            f"The ledger {path} belongs to {theirs}, but this session to {cloud_name} at "
            f"{base_url}. It is unchanged. Keep a ledger for each."
        )
    return True


def _check_remains(path: Path) -> None:
    log = find_companion(path, "-wal")
    if not _is_new(log):
        raise LedgerError(
            f"The ledger {path} is missing, but its log {log.name} exists and holds records. "
            "Put the ledger back, or remove the log to start over."
        )


def _check_pages(connection: sqlite3.Connection, path: Path) -> None:
    ((pages,),) = connection.execute("PRAGMA page_count")
    ((page_size,),) = connection.execute("PRAGMA page_size")
    size = path.stat().st_size
    verdict = "ok"
    if size < pages * page_size:
        verdict = f"{pages * page_size - size} bytes are missing at its end"
    elif size <= LARGEST_CHECKED:
        ((verdict,),) = connection.execute("PRAGMA quick_check(1)")
    if verdict != "ok":
        raise LedgerError(
            f"The ledger {path} is damaged ({shorten(str(verdict))}). It is unchanged. Restore it from a copy, "
            "or move it away."
        )


def lock(path: Path) -> sqlite3.Connection:
    """Become the only writer while the connection is open.

    This is a SQLite lock on a separate file. It works everywhere and ends with the process.

    Raises:
        LedgerError: Another writer exists, or the directory is not writable.
    """
    guard = find_companion(path, "-lock")
    with explaining(path):
        if not guard.exists():
            _create_private(guard)
        connection = sqlite3.connect(
            guard, isolation_level=None, timeout=0, check_same_thread=False
        )
        try:
            connection.execute("BEGIN EXCLUSIVE")
        except BaseException:
            connection.close()
            raise
        return connection


def _create_private(path: Path) -> None:
    """Create an empty file that only its owner may read, unless it exists."""
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))


def create(path: Path, base_url: str, cloud_name: str) -> None:
    """Create an empty ledger, atomically. Only its owner can read it.

    An empty file at the path keeps its permissions. A link stays a link.

    Raises:
        LedgerError: It cannot be created.
    """
    path = Path(os.path.realpath(path))
    unfinished = find_companion(path, "-new")
    with explaining(path):
        unfinished.unlink(missing_ok=True)
        _create_private(unfinished)
        if path.exists():
            unfinished.chmod(stat.S_IMODE(path.stat().st_mode))
        with contextlib.closing(sqlite3.connect(unfinished, isolation_level=None)) as connection:
            connection.executescript(_SCHEMA)
            connection.execute("INSERT INTO owner VALUES (?, ?, 0)", (base_url, cloud_name))
            connection.execute("COMMIT")
            connection.execute("PRAGMA journal_mode = WAL")
        unfinished.replace(path)
        _sync_directory(path.absolute().parent)


def _sync_directory(directory: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def connect_for_writing(path: Path) -> sqlite3.Connection:
    """Open a verified ledger for writing, and check that it can be written. Each commit is durable.

    Raises:
        LedgerError: It cannot be written to.
    """
    with explaining(path):
        connection = _connect(path, "mode=rw")
        try:
            ((mode,),) = connection.execute("PRAGMA journal_mode = WAL")
            if mode != "wal":
                raise LedgerError(
                    f"The ledger {path} is on a file system without shared memory, such as a "
                    "network disk. Keep it on a local disk."
                )
            connection.execute("PRAGMA synchronous = FULL")
            # finds a full disk or a read-only file before anything is sent and paid for
            connection.execute("INSERT OR REPLACE INTO answers VALUES (-1, zeroblob(?))", (PROBE,))
            connection.execute("DELETE FROM answers WHERE record = -1")
            connection.execute("UPDATE owner SET begun = ?", (SYSTEM_CLOCK.wall(),))
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except BaseException:
            connection.close()
            raise
        return connection


class Witness:
    """Detects that the file at a path is no longer the open file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._log = find_companion(path, "-wal")
        with explaining(path):
            self._seen = self._look()

    def _look(self) -> tuple[int, int]:
        status = self._path.stat()
        return status.st_dev, status.st_ino

    def check(self) -> None:
        """Check after a commit that ledger and log still exist.

        Raises:
            LedgerError: They are gone, or replaced.
        """
        try:
            if self._look() == self._seen and self._log.exists():
                return
        except OSError:
            pass
        raise LedgerError(
            f"The ledger {self._path} was removed or replaced while it was in use, perhaps with "
            "its directory. Nothing more can be recorded. Put it back and run again."
        )
