"""The ledger of a run: the items of the input and their results."""

from __future__ import annotations

import asyncio
import hashlib
import os
import stat
import tempfile
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Mapping
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Final

import attrs
from rich.console import Console

from cloudinary_analyze._policy import find_stop, is_final
from cloudinary_analyze._wire import codec
from cloudinary_analyze.cli.feed import LineSource, read_items
from cloudinary_analyze.cli.models import BuildRequest
from cloudinary_analyze.cli.screen import CommandError, say
from cloudinary_analyze.cli.service import Service
from cloudinary_analyze.cli.text import read_source
from cloudinary_analyze.config import Settings
from cloudinary_analyze.errors import AnalyzeError, InvalidRequestError, LedgerError
from cloudinary_analyze.ledger.file import (
    COMPANIONS,
    connect_for_reading,
    explaining,
    find_companion,
    lock,
)
from cloudinary_analyze.ledger.items import Inventory, ItemRow
from cloudinary_analyze.ledger.sqlite import PATIENCE, SQLiteLedger, build_row
from cloudinary_analyze.outcomes import AnyOutcome
from cloudinary_analyze.protocols import Claim, LedgerRecord
from cloudinary_analyze.requests import KeyBuilder, Uri
from cloudinary_analyze.results.records import InputItem, InputLine

SHOWN_BAD_LINES: Final = 10
_ANY_SOURCE: Final = Uri("https://example.com/")


class HaltedError(Exception):
    """The user asked to stop."""


class RunLedger(SQLiteLedger):
    """The ledger of a run, whose items are noted with their lines, invalid ones included.

    The items were read from the ledger, so most requests need no further search in it.
    """

    def __init__(self, path: str | os.PathLike[str], *, patience: float = PATIENCE) -> None:
        super().__init__(path, patience=patience)
        self._fresh: set[str] = set()

    def expect(self, key: str) -> None:
        """Note that nothing is recorded for a key whose request comes next."""
        self._fresh.add(key)

    async def find(self, key: str) -> LedgerRecord | None:
        """See `SQLiteLedger.find`."""
        if key not in self._fresh:
            return await super().find(key)
        self._use()
        return None

    async def claim(self, key: str) -> Claim | None:
        """See `SQLiteLedger.claim`."""
        if key not in self._fresh or self._use().trouble is not None:
            return await super().claim(key)
        self._fresh.discard(key)
        return Claim()

    async def note_item(self, key: str, *, source: str, model: str, index: int) -> None:
        """Do nothing; see `Book.register`."""


@attrs.define(eq=False)
class Book:
    """The ledger of a run.

    Attributes:
        ledger: The ledger; open.
        begun_before: Whether an earlier run noted items in it.
        rows: The rows of the input.
        bad_lines: The first invalid lines of the input.
    """

    ledger: RunLedger
    begun_before: bool
    rows: int = attrs.field(default=0, init=False)
    bad_lines: list[InputLine] = attrs.field(factory=list, init=False)
    _makers: Mapping[str, KeyBuilder]
    _halted: bool = attrs.field(default=False, init=False)

    def halt(self) -> None:
        """Abort `register`, which then keeps nothing. Thread-safe."""
        self._halted = True

    async def register(self, source: LineSource, limit: int | None) -> Inventory:
        """Replace the items of an earlier run with those of a source.

        Raises:
            HaltedError: `halt` was called.
            ConfigurationError: The input cannot be read.
            OSError: The input could not be read to its end.
            LedgerError: The ledger cannot be written.
        """
        try:
            return await self.ledger.replace_items(lambda: self._build_rows(source, limit))
        except asyncio.CancelledError:
            self.halt()  # closing the ledger waits until its thread has stopped reading
            raise

    async def clear(self) -> None:
        """Remove the items of an earlier run.

        Raises:
            LedgerError: The ledger cannot be written.
        """
        await self.ledger.replace_items(tuple)

    def _build_rows(self, source: LineSource, limit: int | None) -> Iterator[ItemRow]:
        self.bad_lines.clear()
        self.rows = 0
        with closing(read_items(source, tuple(self._makers), limit)) as items:
            line, columns = None, None
            for item in items:
                if self._halted:
                    raise HaltedError
                if item.line is not line:  # the columns of a row are encoded once for all models
                    line, columns = item.line, _dump_columns(item.line)
                    self.rows += 1
                    if line.error is not None and len(self.bad_lines) < SHOWN_BAD_LINES:
                        self.bad_lines.append(line)
                yield self._build_row(item, columns)
            if line is None:
                raise CommandError(f"The input, {source.name}, has no rows. Nothing was sent.")

    def _build_row(self, item: InputItem, columns: bytes | None) -> ItemRow:
        line, key = item.line, None
        if line.source is not None and item.model is not None:
            maker = self._makers[item.model]
            key = maker.build(line.source) if line.name is None else maker.build_named(line.name)
        return build_row(
            source=line.text if line.source is None else str(line.source),
            line=line.number,
            model=item.model,
            key=key,
            file=line.file,
            name=line.name,
            columns=columns,
            error=line.error,
        )

    def read_items(self, *, open_only: bool) -> Generator[InputItem, None, None]:
        """Yield the items. For one thread.

        Args:
            open_only: Whether to leave out items that are invalid, or have a response or a final
                error.

        Raises:
            LedgerError: The ledger cannot be read.
        """
        for noted in self.ledger.iter_noted(open_only=open_only):
            bad = noted.error if noted.model is None else None
            line = InputLine(
                number=noted.line or 0,
                text=noted.source,
                source=None if bad is not None else read_source(noted.source),
                error=bad if isinstance(bad, InvalidRequestError) else None,
                name=noted.name,
                file=noted.file,
                columns=noted.columns,
            )
            fresh = open_only and noted.first and noted.task_id is None
            yield InputItem(line, noted.model, noted.index, noted.key if fresh else None)

    async def note(self, item: InputItem) -> None:
        """Note an item of a source that can be read only once.

        Raises:
            LedgerError: It cannot be written.
        """
        assert item.index is not None
        row = self._build_row(item, _dump_columns(item.line))
        await self.ledger.add_item(item.index, row)

    async def note_failure(self, outcome: AnyOutcome, settings: Settings) -> bool:
        """Note why an item failed for a transient reason, which a ledger does not record.

        Returns:
            Whether the item failed for a transient reason, so that the next run retries it.

        Raises:
            LedgerError: It cannot be written.
        """
        error, item = outcome.error, outcome.item
        if error is None or find_stop(error, settings) is not None:
            return False
        if not isinstance(error, AnalyzeError):
            error = AnalyzeError(f"{type(error).__name__}: {error}")
        elif is_final(error):
            return False
        await self.ledger.add_error(item.index, error)
        return True


def _dump_columns(line: InputLine) -> bytes | None:
    return None if line.columns is None else codec.dumps(line.columns)


def build_makers(builders: Mapping[str, BuildRequest]) -> dict[str, KeyBuilder]:
    """Return the key builder of each model."""
    return {model: KeyBuilder(build(_ANY_SOURCE)) for model, build in builders.items()}


@asynccontextmanager
async def open_book(
    path: Path,
    service: Service,
    builders: Mapping[str, BuildRequest],
    *,
    retry_failed: bool,
    patience: float,
    console: Console,
    make: Callable[..., RunLedger] | None = None,
) -> AsyncIterator[Book]:
    """Open the ledger of a run for the duration of the block.

    An emulator in this process has a new address each time, so its run starts over.

    Raises:
        LedgerError: It cannot be used.
    """
    if service.emulator is not None and remove_emulated(path):
        say(
            console,
            f"The ledger {path} of an earlier emulator run was removed: each starts over.",
            style="dim",
        )
        begun_before = True  # the file at that path is its output
    else:
        begun_before = False
    async with (make or RunLedger)(path, patience=patience) as ledger:
        await ledger.open(**service.identify())
        with closing(iter(ledger.iter_items())) as items:  # type: ignore[type-var]
            begun_before = begun_before or next(items, None) is not None
        await _absorb_rescued(ledger, console)
        if retry_failed:
            await ledger.forget_errors()
        try:
            yield Book(ledger, begun_before, build_makers(builders))
        finally:
            if ledger.failed:
                await _rescue(ledger, console)


def find_rescued(ledger: Path) -> Iterator[Path]:
    """Yield the files, best first, for responses that a ledger cannot record.

    Each is in a directory other than the ledger's, which only its owner can enter.
    """
    name = hashlib.sha256(os.fsencode(os.path.realpath(ledger))).hexdigest()[:16]
    owner = f"-{os.getuid()}" if os.name == "posix" else ""
    home = os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")  # noqa: PTH111
    for parent in (Path(home), Path(tempfile.gettempdir())):
        if parent.is_absolute():  # there may be no home directory
            yield parent / f"cloudinary-analyze{owner}" / f"{ledger.name}-{name}.rescued"


def _is_private(directory: Path) -> bool:
    """Whether only this user can put files into a directory."""
    status = directory.lstat()
    owned = os.name != "posix" or (status.st_uid == os.getuid() and not status.st_mode & 0o022)
    return stat.S_ISDIR(status.st_mode) and owned


async def _absorb_rescued(ledger: SQLiteLedger, console: Console) -> None:
    for path in find_rescued(ledger.path):
        if path.exists() and _is_private(path.parent):
            try:
                await ledger.absorb(path)
            except LedgerError as error:
                say(console, f"Saved responses were not read: {error.message}", style="yellow")
                continue
            for suffix in COMPANIONS:
                find_companion(path, suffix).unlink(missing_ok=True)
            path.unlink()
            say(console, f"Responses that an earlier run saved in {path} are in the ledger now.")


async def _rescue(ledger: SQLiteLedger, console: Console) -> None:
    """Save the responses that a ledger could not record in another directory."""
    for path in find_rescued(ledger.path):
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if not _is_private(path.parent):
                continue
            count = await asyncio.to_thread(ledger.rescue, path)
        except (OSError, LedgerError):
            continue
        if count:
            say(
                console,
                f"{count:,} records that the ledger could not take are saved in {path}. The next "
                f"run with the ledger {ledger.path} reads them.",
                style="bold",
            )
        return
    say(
        console,
        "Responses that the ledger could not record are lost. The next run requests them again.",
        style="red",
    )


def remove_emulated(path: Path) -> bool:
    """Remove a ledger of an emulator. Return whether there was one.

    Raises:
        LedgerError: Another run writes to it.
    """
    from cloudinary_analyze.emulator.server import CLOUD_NAME_PREFIX

    if not path.exists() or not path.stat().st_size:
        return False
    try:
        with closing(connect_for_reading(path)) as connection, explaining(path):
            ((cloud_name,),) = connection.execute("SELECT cloud_name FROM owner")
    except LedgerError:
        return False  # opening it will report what is wrong with it
    if not cloud_name.startswith(CLOUD_NAME_PREFIX):
        return False
    with closing(lock(path)), explaining(path):
        for suffix in ("", "-wal", "-shm"):
            find_companion(path, suffix).unlink(missing_ok=True)
    return True
