"""The input of a run as items, pulled no faster than they are sent, and stoppable at any time.

A thread of its own reads, so a slow pipe never keeps the event loop from the calls in flight. It
is a daemon, because nothing can wake a thread that waits for a silent pipe. Items that an earlier
run has done are passed over there, too.
"""

from __future__ import annotations

import asyncio
import os
import stat
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import Annotated, Final, Protocol

import attrs
from cyclopts import Parameter, validators

from cloudinary_analyze.cli.input import InputFormat, detect_format, read_input
from cloudinary_analyze.cli.screen import STANDARD, CommandError
from cloudinary_analyze.requests import Uri
from cloudinary_analyze.results.records import InputItem, InputLine

READ_AHEAD: Final = 1000  # lines
COUNTING_SECONDS: Final = 5.0
COUNTED_AT_ONCE: Final = 100  # lines, some 0.3 ms
COUNTING_PAUSE: Final = 0.0005  # seconds

ReadLines = Callable[[], Generator[InputLine, None, None]]


@attrs.frozen(kw_only=True)
class LineSource:
    """Where the lines of a run come from.

    Attributes:
        read: Begins to read them; a generator.
        name: What the user calls it.
        countable: Whether they can be read twice, and so be counted beforehand.
    """

    read: ReadLines
    name: str
    countable: bool


class Earlier(Protocol):
    """What an earlier run of the same items has done. Asked in their order, by one thread."""

    def is_done(self, item: InputItem) -> bool:
        """Whether an item needs nothing more."""
        ...

    def end(self, count: int) -> None:
        """Be told how many items there are, once the last was asked for."""
        ...


@attrs.define(eq=False)
class ItemFeed:
    """An async iterator of a run's items: each line once per model, a bad line once alone.

    Attributes:
        source: Where the lines come from.
        models: The models, by their wire names.
        limit: How many lines to take at the most.
        open_earlier: Opens what tells which items are done already; ``None``: none is.
        total_lines: How many lines there are; ``None`` until they were counted.
        total_items: How many items they make.
        pulled_lines: How many lines were taken so far.
        skipped_lines: How many lines were passed over, because all of their items are done.
        skipped_items: How many items were passed over.
        exhausted: Whether the last line was taken.
    """

    source: LineSource
    models: tuple[str, ...]
    limit: int | None = None
    open_earlier: Callable[[], AbstractContextManager[Earlier]] | None = None
    total_lines: int | None = attrs.field(default=None, init=False)
    total_items: int | None = attrs.field(default=None, init=False)
    pulled_lines: int = attrs.field(default=0, init=False)
    skipped_lines: int = attrs.field(default=0, init=False)
    skipped_items: int = attrs.field(default=0, init=False)
    exhausted: bool = attrs.field(default=False, init=False)
    _last_line: int = attrs.field(default=0, init=False)
    _unfinished: dict[int, int] = attrs.field(factory=dict, init=False)
    _items: deque[InputItem] = attrs.field(factory=deque, init=False)
    _lines: deque[list[InputItem]] = attrs.field(factory=deque, init=False)
    _places: threading.Semaphore = attrs.field(init=False)
    _changed: asyncio.Event = attrs.field(factory=asyncio.Event, init=False)
    _loop: asyncio.AbstractEventLoop | None = attrs.field(default=None, init=False)
    _waiting: bool = attrs.field(default=False, init=False)
    _read_up: bool = attrs.field(default=False, init=False)
    _failure: Exception | None = attrs.field(default=None, init=False)
    _counting: threading.Thread | None = attrs.field(default=None, init=False)
    _stopped: bool = attrs.field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self._places = threading.Semaphore(READ_AHEAD)

    @property
    def stopped(self) -> bool:
        """Whether `stop` was called."""
        return self._stopped

    @property
    def finished_through(self) -> int:
        """The number of the last line up to which every line has all of its outcomes."""
        return next(iter(self._unfinished), self._last_line + 1) - 1

    def start(self) -> None:
        """Begin to read, and soon to count where that is possible."""
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, name="input", daemon=True).start()

    async def wait_for_total(self) -> int | None:
        """Return how many items there are, after a wait if they are being counted."""
        if self._counting is not None:
            await asyncio.to_thread(self._counting.join, COUNTING_SECONDS)
        return self.total_items

    def stop(self) -> None:
        """End after the line that was taken last. Idempotent; for the loop's thread."""
        self._stopped = True
        self._changed.set()
        self._places.release()

    def finish(self, item: InputItem) -> None:
        """Take note that an item has its outcome."""
        number = item.line.number
        self._unfinished[number] -= 1
        if not self._unfinished[number]:
            del self._unfinished[number]

    def __aiter__(self) -> ItemFeed:
        return self

    async def __anext__(self) -> InputItem:
        """Return the next item.

        Raises:
            StopAsyncIteration: There is no further line, or it was stopped.
            ConfigurationError: The input cannot be read.
            OSError: It could not be read on.
        """
        if not self._items:
            items = await self._take_line()
            self._items.extend(items)
            number = items[0].line.number
            self._unfinished[number] = len(items)
            self._last_line = number
            self.pulled_lines += 1
        return self._items.popleft()

    async def _take_line(self) -> list[InputItem]:
        while True:
            if self._stopped:
                raise StopAsyncIteration
            # set before the queue is looked at again, or the thread's last word could be missed
            self._changed.clear()
            self._waiting = True
            read_up = self._read_up
            if self._lines:
                self._waiting = False
                self._places.release()
                return self._lines.popleft()
            if read_up:
                if self._failure is not None:
                    raise self._failure
                self.exhausted = True
                raise StopAsyncIteration
            await self._changed.wait()

    def _read(self) -> None:
        try:
            with ExitStack() as stack:
                lines = stack.enter_context(closing(self.source.read()))
                earlier = None
                if self.open_earlier is not None:
                    earlier = stack.enter_context(self.open_earlier())
                self._read_lines(lines, earlier)
        except Exception as error:
            self._failure = error
        finally:
            self._read_up = True
            self._waiting = True
            self._tell()

    def _read_lines(self, lines: Generator[InputLine, None, None], earlier: Earlier | None) -> None:
        count = index = 0
        for line in islice(lines, self.limit):
            count += 1
            items = self._split(line, index)
            index += len(items)
            if earlier is not None:
                left = [item for item in items if not earlier.is_done(item)]
                self.skipped_items += len(items) - len(left)
                items = left
            if items:
                if self._counting is None and self.source.countable:
                    self._begin_to_count()
                self._places.acquire()
                self._lines.append(items)
                self._tell()
            else:
                self.skipped_lines += 1
            if self._stopped:
                return
        self.total_lines, self.total_items = count, index
        if earlier is not None:
            earlier.end(index)

    def _split(self, line: InputLine, index: int) -> list[InputItem]:
        if line.error is not None:
            return [InputItem(line, index=index)]
        return [InputItem(line, model, place) for place, model in enumerate(self.models, index)]

    def _tell(self) -> None:
        if self._waiting and self._loop is not None:
            self._waiting = False
            try:
                self._loop.call_soon_threadsafe(self._changed.set)
            except RuntimeError:  # the loop is closed; nobody waits any more
                self._stopped = True

    def _begin_to_count(self) -> None:
        # not before the done items are passed over, as it would slow that down
        self._counting = threading.Thread(target=self._count, name="input-count", daemon=True)
        self._counting.start()

    def _count(self) -> None:
        lines = items = 0
        try:
            for line in islice(self.source.read(), self.limit):
                if lines % COUNTED_AT_ONCE == 0 and not self._stopped:
                    # or the loop, and what writes the ledger, would wait 5 ms for each turn
                    time.sleep(COUNTING_PAUSE)
                lines += 1
                items += len(self.models) if line.error is None else 1
        except Exception:
            return  # the reading thread meets the same error, and tells of it
        self.total_lines, self.total_items = lines, items


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class InputOptions:
    """Where the sources of a run come from.

    Attributes:
        name: The file; ``-`` is standard input; ``None``: there is none.
        input_format: How to read it; ``None``: by its extension.
        column: The column of the sources.
        key_column: The column that names an item for good.
        limit: The number of lines to process at most.
    """

    name: Annotated[
        str | None,
        Parameter(
            name=["--input", "-i"],
            help="File with one URL or asset:ID per line, or CSV or JSON Lines; - is stdin.",
            allow_leading_hyphen=True,
        ),
    ] = None
    input_format: Annotated[
        InputFormat | None,
        Parameter(name="--input-format", help="Format of the input. Default: by its extension."),
    ] = None
    column: Annotated[
        str | None,
        Parameter(
            name="--column", help="Column or field of the sources. Default: url, uri or source."
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
    limit: Annotated[
        int | None,
        Parameter(
            name="--limit",
            help="Process only the first N lines.",
            validator=validators.Number(gte=1),
        ),
    ] = None

    @property
    def described(self) -> bool:
        """Whether there is an option that describes an input."""
        return not (self.input_format is self.column is self.key_column is None)


NO_INPUT: Final = InputOptions()


def open_source(options: InputOptions) -> LineSource:
    """Return the source that a name on the command line means.

    Of a file the beginning is read, so that one that is no such text is refused at once.

    Raises:
        CommandError: There is no such file, or the options do not fit it.
        ConfigurationError: It is no text, or has no such column.
    """
    name, column, key_column = options.name, options.column, options.key_column
    assert name is not None
    chosen = options.input_format or detect_format(name)
    for option, value in (("--column", column), ("--key-column", key_column)):
        if value is not None and chosen == "text":
            raise CommandError(
                f"{option} is for CSV and JSON Lines; name one of them with --input-format."
            )
    columns = (column, key_column)
    if name == STANDARD:
        if sys.stdin is None or sys.stdin.closed:
            raise CommandError("--input - reads standard input, which is closed.")
        return _build_source(sys.stdin.fileno(), "standard input", chosen, columns, countable=False)
    try:
        mode = Path(name).stat().st_mode
        if stat.S_ISDIR(mode):
            raise CommandError(f"The input {name} is a directory; --input takes a file.")
        if not os.access(name, os.R_OK):
            raise CommandError(f"The input {name} cannot be read: permission denied.")
    except OSError as error:
        raise CommandError(f"The input {name} cannot be read: {error.strerror}.") from None
    # what is no regular file, such as a pipe of the shell's, can be read only once
    source = _build_source(Path(name), name, chosen, columns, countable=stat.S_ISREG(mode))
    if source.countable:
        with closing(source.read()) as lines:
            next(lines, None)
    return source


def _build_source(
    file: int | Path,
    name: str,
    input_format: InputFormat,
    columns: tuple[str | None, str | None],
    *,
    countable: bool,
) -> LineSource:
    column, key_column = columns

    def read() -> Generator[InputLine, None, None]:
        # not sys.stdin: the interpreter cannot end while a thread waits inside of that
        with open(file, "rb", closefd=not isinstance(file, int)) as stream:
            yield from read_input(
                stream, input_format=input_format, column=column, name_column=key_column
            )

    return LineSource(read=read, name=name, countable=countable)


def build_sample_source(urls: Sequence[str]) -> LineSource:
    """Return the source of the emulator's gallery."""

    def read() -> Generator[InputLine, None, None]:
        for number, url in enumerate(urls, start=1):
            yield InputLine(number, url, Uri(url))

    return LineSource(read=read, name="the emulator's gallery", countable=True)
