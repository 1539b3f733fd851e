"""The input of a run as items. They are read no faster than they are sent, and can be stopped.

A separate thread reads, so a slow pipe does not block the event loop. It is a daemon, because
nothing can wake a thread that waits for a silent pipe.
"""

from __future__ import annotations

import asyncio
import glob
import gzip
import os
import sqlite3
import stat
import sys
import threading
import zlib
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Annotated, BinaryIO, Final, TypeAlias, cast

import attrs
from cyclopts import Parameter, validators

from cloudinary_analyze._sources import is_same_image
from cloudinary_analyze.cli.input import Columns, InputFormat, detect_format, read_input
from cloudinary_analyze.cli.screen import STANDARD, CommandError
from cloudinary_analyze.errors import ConfigurationError, InvalidRequestError, describe_reason
from cloudinary_analyze.requests import Uri
from cloudinary_analyze.results.records import InputItem, InputLine

READ_AHEAD: Final = 1000  # items
_GZIP: Final = b"\x1f\x8b"
_NONE: Final = "none"


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class InputOptions:
    """The input of a run, as the options describe it.

    Attributes:
        names: Files and glob patterns; ``-`` is standard input.
        input_format: The format of the files. ``None``: by their extensions.
        column: The column of the sources.
        key_column: The column that identifies an item instead of its source.
        keep: The columns that are kept for the output, with commas between.
        limit: The maximum number of lines to process.
        shard: The part of the lines to process, such as ``1/4``.
    """

    names: Annotated[
        tuple[str, ...],
        Parameter(
            name=["--input", "-i"],
            help="File or glob pattern; repeatable. Plain text with one URL or asset:ID per line, "
            "CSV, JSON Lines or Parquet, also with .gz; - is stdin.",
            allow_leading_hyphen=True,
            show_default=False,
        ),
    ] = ()
    input_format: Annotated[
        InputFormat | None,
        Parameter(name="--input-format", help="Format of the input. Default: by its extension."),
    ] = None
    column: Annotated[
        str | None,
        Parameter(
            name="--column",
            help="Column or field of the sources, also dotted (image.url). Default: url, uri or "
            "source.",
        ),
    ] = None
    key_column: Annotated[
        str | None,
        Parameter(
            name="--key-column",
            help="Column that identifies each image, for inputs whose URLs change between runs "
            "(for example, signed URLs).",
        ),
    ] = None
    keep: Annotated[
        str | None,
        Parameter(
            name="--keep",
            help="Columns of the input to write to the output, such as id,sku; none for none. "
            "Default: all.",
        ),
    ] = None
    limit: Annotated[
        int | None,
        Parameter(
            name="--limit",
            help="Process only the first N lines.",
            validator=validators.Number(gte=1),
        ),
    ] = None

    shard: Annotated[
        str | None,
        Parameter(
            name="--shard",
            help="I/N: process only every N-th line, from the I-th on. For N machines.",
        ),
    ] = None

    @property
    def column_options(self) -> dict[str, str]:
        """The options that name columns."""
        options = {"--column": self.column, "--key-column": self.key_column, "--keep": self.keep}
        return {name: value for name, value in options.items() if value is not None}

    def read_columns(self) -> Columns:
        """Return the roles of the columns."""
        keep = None
        if self.keep is not None:
            names = [name.strip() for name in self.keep.split(",")]
            keep = () if names == [_NONE] else tuple(filter(None, names))
        return Columns(source=self.column, name=self.key_column, keep=keep)


NO_INPUT: Final = InputOptions()


@attrs.frozen(kw_only=True)
class LineSource:
    """The source of the lines of a run.

    Attributes:
        read: A generator function that reads them.
        name: Its name, as the user wrote it.
        files: The files; ``-`` is standard input.
        repeatable: Whether they can be read more than once.
    """

    read: Callable[[], Generator[InputLine, None, None]]
    name: str
    files: tuple[Path | str, ...] = ()
    repeatable: bool = True


def open_source(options: InputOptions) -> LineSource:
    """Return the source that the options describe.

    The beginning of each file is read, so that an unreadable file raises at once.

    Raises:
        CommandError: The file does not exist, or the options do not fit it.
        ConfigurationError: A file is not text, or a column is missing.
    """
    columns = options.read_columns()
    sources = []
    for name in _find_files(options.names):
        chosen = options.input_format or ("text" if name == STANDARD else detect_format(name))
        if chosen == "text":
            for option in options.column_options:
                raise CommandError(
                    f"{option} needs columns, and {name} is read as plain text. Name its format "
                    "with --input-format."
                )
        label = name if len(options.names) > 1 or name not in options.names else None
        sources.append(_open_one(name, chosen, columns, label))

    def read() -> Generator[InputLine, None, None]:
        for source in sources:
            yield from source.read()

    check = _check_names if options.key_column is not None else None
    first = sources[0]
    return LineSource(
        read=read if check is None else lambda: check(read()),
        name=first.name if len(sources) == 1 else f"{len(sources)} files",
        files=tuple(file for source in sources for file in source.files),
        repeatable=all(source.repeatable for source in sources),
    )


def check_rows(source: LineSource) -> None:
    """Check in advance, before a ledger is created, that an input of files has rows.

    Raises:
        CommandError: It has none.
        ConfigurationError: It cannot be read.
    """
    with closing(source.read()) as lines:
        if next(lines, None) is None:
            raise CommandError(f"The input, {source.name}, has no rows. Nothing was sent.")


def _find_files(names: Sequence[str]) -> list[str]:
    """Expand glob patterns, unless a file has that name.

    Raises:
        CommandError: A pattern matches nothing, or a file is named twice.
    """
    found: list[str] = []
    for name in names:
        if name == STANDARD or Path(name).exists() or not glob.has_magic(name):
            matches = [name]
        else:
            matches = sorted(filter(os.path.isfile, glob.glob(name, recursive=True)))  # noqa: PTH207 -- takes absolute patterns
            if not matches:
                raise CommandError(f"The pattern {name} matches no file.")
        found += matches
    identities: dict[object, str] = {}
    for name in found:
        identity: object = name
        if name != STANDARD and Path(name).exists():
            status = Path(name).stat()
            identity = (status.st_dev, status.st_ino)
        if identity in identities:
            raise CommandError(f"The inputs {identities[identity]} and {name} are the same file.")
        identities[identity] = name
    return found


def _open_one(
    name: str, input_format: InputFormat, columns: Columns, label: str | None
) -> LineSource:
    if name == STANDARD:
        if sys.stdin is None or sys.stdin.closed:
            raise CommandError("--input - reads standard input, which is closed.")
        file: int | Path = sys.stdin.fileno()
        regular = False
    else:
        file = Path(name)
        try:
            mode = file.stat().st_mode
            if stat.S_ISDIR(mode):
                raise CommandError(f"The input {name} is a directory; --input takes a file.")
            if not os.access(name, os.R_OK):
                raise CommandError(f"The input {name} cannot be read: permission denied.")
        except OSError as error:
            raise CommandError(f"The input {name} cannot be read: {error.strerror}.") from None
        regular = stat.S_ISREG(mode)  # a pipe can be read only once
    if input_format == "parquet" and not regular:
        raise CommandError("Parquet is read from a file, not from a pipe. Pass the file's name.")

    def read() -> Generator[InputLine, None, None]:
        # not sys.stdin: the interpreter cannot end while a thread waits inside it
        with open(file, "rb", closefd=not isinstance(file, int)) as stream:
            lines = read_input(
                _decompress(stream), input_format=input_format, columns=columns, file=label
            )
            try:
                yield from lines
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ConfigurationError(
                    f"The compressed input {name} is damaged: {describe_reason(error)}."
                ) from error
            except ConfigurationError as error:
                raise ConfigurationError(f"{name}: {error.message}") from error

    if regular:
        with closing(read()) as lines:
            next(lines, None)
    shown = "standard input" if name == STANDARD else name
    return LineSource(
        read=read,
        name=shown,
        files=(STANDARD if isinstance(file, int) else file,),
        repeatable=regular,
    )


def _decompress(stream: BinaryIO) -> BinaryIO:
    peek = getattr(stream, "peek", None)
    if peek is not None and peek(len(_GZIP))[: len(_GZIP)] == _GZIP:
        return cast(BinaryIO, gzip.open(stream))
    return stream


def build_sample_source(urls: Sequence[str]) -> LineSource:
    """Return the source of the emulator's gallery."""

    def read() -> Generator[InputLine, None, None]:
        for number, url in enumerate(urls, start=1):
            yield InputLine(number, url, Uri(url))

    return LineSource(read=read, name="the emulator's gallery")


def _check_names(lines: Iterable[InputLine]) -> Generator[InputLine, None, None]:
    """Refuse each line whose name an earlier line gave to another source."""
    with closing(sqlite3.connect("", isolation_level=None)) as known:  # a separate file, deleted
        known.execute("PRAGMA journal_mode = OFF")
        known.execute("BEGIN")
        known.execute("CREATE TABLE names (name BLOB PRIMARY KEY, source TEXT, line INTEGER, file)")
        for line in lines:
            if line.source is None or line.name is None:
                yield line
                continue
            name, source = line.name.encode(errors="surrogatepass"), str(line.source)
            row = (name, source, line.number, line.file)
            if known.execute("INSERT OR IGNORE INTO names VALUES (?, ?, ?, ?)", row).rowcount:
                yield line
                continue
            ((first, number, file),) = known.execute(
                "SELECT source, line, file FROM names WHERE name = ?", (name,)
            )
            yield (
                line
                if is_same_image(first, source)
                else _refuse_name(line, describe_line(number, file))
            )


def _refuse_name(line: InputLine, earlier: str) -> InputLine:
    error = InvalidRequestError(
        f"The key {line.name!r:.200} already names another source, in {earlier}. Nothing is sent "
        f"for {describe_line(line.number, line.file)}. Give each source its own key."
    )
    return attrs.evolve(line, source=None, error=error)


def describe_line(number: int, file: str | None) -> str:
    """Return the description of a line of the input."""
    return f"line {number}" if file is None else f"line {number} of {file}"


def describe_bad_line(line: InputLine) -> str:
    """Return the sentence for an invalid line."""
    return f"{describe_line(line.number, line.file)}: {line.error}"


def read_items(
    source: LineSource, models: Sequence[str], limit: int | None
) -> Generator[InputItem, None, None]:
    """Yield the items of a source: each line once per model, an invalid line once alone."""
    index = 0
    with closing(source.read()) as lines:
        for line in islice(lines, None if limit is None else min(limit, sys.maxsize)):
            for model in models if line.error is None else (None,):
                yield InputItem(line, model, index)
                index += 1


Place: TypeAlias = "tuple[str | None, int]"
"""The file and the number of a line."""


@attrs.define(eq=False)
class _Unfinished:
    """A line that does not have all of its outcomes yet.

    Attributes:
        left: The number of missing outcomes.
        before: The line before it.
    """

    left: int
    before: Place | None


@attrs.define(eq=False)
class ItemFeed:
    """An async iterator of a run's items, which a thread reads ahead.

    Attributes:
        read: A generator function that reads the items, in the thread.
        width: The number of items per valid line.
        pulled: The number of items taken so far.
    """

    read: Callable[[], Generator[InputItem, None, None]]
    width: int
    pulled: int = attrs.field(default=0, init=False)
    _last_line: Place | None = attrs.field(default=None, init=False)
    _unfinished: dict[Place, _Unfinished] = attrs.field(factory=dict, init=False)
    _items: deque[InputItem] = attrs.field(factory=deque, init=False)
    _room: threading.Event = attrs.field(factory=threading.Event, init=False)
    _changed: asyncio.Event = attrs.field(factory=asyncio.Event, init=False)
    _loop: asyncio.AbstractEventLoop | None = attrs.field(default=None, init=False)
    _waiting: bool = attrs.field(default=False, init=False)
    _read_up: bool = attrs.field(default=False, init=False)
    _complete: bool = attrs.field(default=False, init=False)
    _failure: Exception | None = attrs.field(default=None, init=False)
    _stopped: bool = attrs.field(default=False, init=False)

    @property
    def exhausted(self) -> bool:
        """Whether the last item was taken."""
        return self._complete and not self._items

    @property
    def finished_through(self) -> Place | None:
        """The last line up to which every line has all of its outcomes."""
        first = next(iter(self._unfinished.values()), None)
        return self._last_line if first is None else first.before

    def start(self) -> None:
        """Begin to read."""
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, name="input", daemon=True).start()

    def stop(self) -> None:
        """End after the item that was taken last. Idempotent. Call it in the loop's thread."""
        self._stopped = True
        self._changed.set()
        self._room.set()

    def finish(self, item: InputItem) -> None:
        """Note that an item has its outcome."""
        place = (item.line.file, item.line.number)
        unfinished = self._unfinished[place]
        unfinished.left -= 1
        if not unfinished.left:
            del self._unfinished[place]

    def __aiter__(self) -> ItemFeed:
        return self

    async def __anext__(self) -> InputItem:
        """Return the next item.

        Raises:
            StopAsyncIteration: There is no further item, or it was stopped.
            ConfigurationError: The input cannot be read.
            OSError: Reading failed.
        """
        item = await self._take()
        line = item.line
        place = (line.file, line.number)
        if place != self._last_line:
            width = 1 if item.model is None else self.width
            self._unfinished[place] = _Unfinished(width, self._last_line)
            self._last_line = place
        self.pulled += 1
        return item

    async def _take(self) -> InputItem:
        while True:
            if self._stopped:
                raise StopAsyncIteration
            # set before the queue is checked again, or the thread's last item could be missed
            self._changed.clear()
            self._waiting = True
            read_up = self._read_up
            if self._items:
                self._waiting = False
                item = self._items.popleft()
                if not self._room.is_set() and len(self._items) <= READ_AHEAD // 2:
                    self._room.set()
                return item
            if read_up:
                if self._failure is not None:
                    raise self._failure
                raise StopAsyncIteration
            await self._changed.wait()

    def _read(self) -> None:
        try:
            with closing(self.read()) as items:
                for item in items:
                    if len(self._items) >= READ_AHEAD:
                        self._room.clear()
                        # checked again: items taken before the clear do not set the event
                        if len(self._items) >= READ_AHEAD and not self._stopped:
                            self._room.wait()
                    self._items.append(item)
                    self._notify()
                    if self._stopped:
                        return
            self._complete = True
        except Exception as error:
            self._failure = error
        finally:
            self._read_up = True
            self._waiting = True
            self._notify()

    def _notify(self) -> None:
        if self._waiting and self._loop is not None:
            self._waiting = False
            try:
                self._loop.call_soon_threadsafe(self._changed.set)
            except RuntimeError:  # the loop is closed, so nothing waits any more
                self._stopped = True
