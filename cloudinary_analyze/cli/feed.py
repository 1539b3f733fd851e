"""The input of a run as items, pulled no faster than they are sent, and stoppable at any time.

A thread of its own reads, so a slow pipe never keeps the event loop from the calls in flight. It
is a daemon, because nothing can wake a thread that waits for a silent pipe.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Generator
from contextlib import closing
from itertools import islice
from typing import Final

import attrs

from cloudinary_analyze.bulk.input import InputItem, InputLine

READ_AHEAD: Final = 1000  # lines

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


@attrs.define(eq=False)
class ItemFeed:
    """An async iterator of a run's items: each line once per model, a bad line once alone.

    Attributes:
        source: Where the lines come from.
        models: The models, by their wire names.
        limit: How many lines to take at the most.
        total_lines: How many lines there are; ``None`` until they were counted, or for ever.
        total_items: How many items they make.
        pulled_lines: How many lines were taken so far.
        exhausted: Whether the last line was taken.
    """

    source: LineSource
    models: tuple[str, ...]
    limit: int | None = None
    total_lines: int | None = attrs.field(default=None, init=False)
    total_items: int | None = attrs.field(default=None, init=False)
    pulled_lines: int = attrs.field(default=0, init=False)
    exhausted: bool = attrs.field(default=False, init=False)
    _last_line: int = attrs.field(default=0, init=False)
    _unfinished: dict[int, int] = attrs.field(factory=dict, init=False)
    _items: deque[InputItem] = attrs.field(factory=deque, init=False)
    _lines: deque[InputLine] = attrs.field(factory=deque, init=False)
    _places: threading.Semaphore = attrs.field(init=False)
    _changed: asyncio.Event = attrs.field(factory=asyncio.Event, init=False)
    _loop: asyncio.AbstractEventLoop | None = attrs.field(default=None, init=False)
    _waiting: bool = attrs.field(default=False, init=False)
    _read_up: bool = attrs.field(default=False, init=False)
    _failure: Exception | None = attrs.field(default=None, init=False)
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
        """Begin to read, and to count where that is possible."""
        self._loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, name="input", daemon=True).start()
        if self.source.countable:
            threading.Thread(target=self._count, name="input-count", daemon=True).start()

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
            line = await self._take_line()
            if line.error is None:
                self._items.extend(InputItem(line, model) for model in self.models)
            else:
                self._items.append(InputItem(line))
            self._unfinished[line.number] = len(self._items)
            self._last_line = line.number
            self.pulled_lines += 1
        return self._items.popleft()

    async def _take_line(self) -> InputLine:
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
            with closing(self.source.read()) as lines:
                for line in islice(lines, self.limit):
                    self._places.acquire()
                    if self._stopped:
                        return
                    self._lines.append(line)
                    self._tell()
        except Exception as error:
            self._failure = error
        finally:
            self._read_up = True
            self._waiting = True
            self._tell()

    def _tell(self) -> None:
        if self._waiting and self._loop is not None:
            self._waiting = False
            try:
                self._loop.call_soon_threadsafe(self._changed.set)
            except RuntimeError:  # the loop is closed; nobody waits any more
                self._stopped = True

    def _count(self) -> None:
        lines = items = 0
        try:
            for line in islice(self.source.read(), self.limit):
                lines += 1
                items += len(self.models) if line.error is None else 1
        except Exception:
            return  # the reading thread meets the same error, and tells of it
        self.total_lines, self.total_items = lines, items
