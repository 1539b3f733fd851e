"""What a person sees while a command runs: messages, progress, and the answer to Ctrl-C.

Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import IntEnum
from types import FrameType, TracebackType
from typing import Final, Self, TextIO

import attrs
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from cloudinary_analyze.responses import Limit

STANDARD: Final = "-"  # standard input or output, as the name of a file


class ExitCode(IntEnum):
    """What the process says when it ends."""

    DONE = 0
    FAILURES = 1
    USAGE = 2
    STOPPED = 3
    INTERRUPTED = 130


class CommandError(Exception):
    """A command cannot go on; its message is a sentence for the user.

    Attributes:
        exit_code: What the process ends with.
    """

    def __init__(self, message: str, *, exit_code: ExitCode = ExitCode.USAGE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def build_console() -> Console:
    """Return a console on stderr, as stderr is now."""
    return Console(file=sys.stderr, highlight=False)


def is_interactive(stream: TextIO) -> bool:
    """Whether a person looks at a stream, on a terminal that can redraw."""
    return stream.isatty() and not Console(file=stream).is_dumb_terminal


def say(console: Console, sentence: str, *, style: str = "") -> None:
    """Print a sentence; it is wrapped by the terminal alone, and never read as markup."""
    console.print(Text(sentence, style=style), soft_wrap=True)


class ConsoleHandler(logging.Handler):
    """Sends log records through a console, so that they do not tear a progress bar."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console
        self.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        try:
            say(self._console, self.format(record), style="dim")
        except Exception:
            self.handleError(record)


@contextmanager
def show_logs(console: Console) -> Iterator[None]:
    """Show warnings and errors of all loggers on a console."""
    handler = ConsoleHandler(console)
    handler.setLevel(logging.WARNING)
    root = logging.getLogger()
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


INTERVAL: Final = 0.2  # seconds


@attrs.frozen(kw_only=True)
class Reading:
    """How far a run has come.

    Attributes:
        done: Items with an outcome, failed ones included.
        failed: Items whose outcome is an error.
        total: Items in all; ``None`` if that is not known.
        quota: What is known of the quotas.
    """

    done: int
    failed: int
    total: int | None
    quota: Mapping[str, Limit]


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("–/s" if speed is None else f"{speed:,.1f}/s")


def describe_quota(quota: Mapping[str, Limit]) -> str:
    """Return what is left of each quota, for one line."""
    left = [
        f"{name} {limit.remaining:,}"
        for name, limit in quota.items()
        if limit.remaining is not None
    ]
    return f"quota left: {', '.join(left)}" if left else ""


@attrs.define(eq=False)
class RunProgress:
    """Draws a run's progress while its block lasts.

    Attributes:
        console: Where to draw; ``None``: nowhere.
        read: Tells how far the run is; asked a few times a second, however fast the run is.
    """

    console: Console | None
    read: Callable[[], Reading]
    _progress: Progress | None = attrs.field(default=None, init=False)
    _row: TaskID | None = attrs.field(default=None, init=False)
    _ticker: asyncio.Task[None] | None = attrs.field(default=None, init=False)

    async def __aenter__(self) -> Self:
        if self.console is not None:
            self._progress = Progress(
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TextColumn("[red]{task.fields[failed]:,} failed"),
                _RateColumn(),
                TimeRemainingColumn(compact=True),
                TextColumn("{task.fields[quota]}", markup=False),
                console=self.console,
                auto_refresh=False,
                redirect_stdout=False,  # a terminal may show the results, too
            )
            self._row = self._progress.add_task("", total=None, failed=0, quota="")
            self._progress.start()
            self._ticker = asyncio.create_task(self._tick())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._progress is None or self._ticker is None:
            return
        self._ticker.cancel()
        await asyncio.wait({self._ticker})
        self._draw()
        self._progress.stop()

    async def _tick(self) -> None:
        while True:
            self._draw()
            await asyncio.sleep(INTERVAL)

    def _draw(self) -> None:
        if self._progress is None or self._row is None:
            return
        reading = self.read()
        self._progress.update(
            self._row,
            completed=reading.done,
            total=reading.total,
            failed=reading.failed,
            quota=describe_quota(reading.quota),
            refresh=True,
        )


SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def handle_interrupts(finish: Callable[[], object], abort: Callable[[], object]) -> Iterator[None]:
    """Call ``finish`` at the first interrupt and ``abort`` at each later one, on the loop.

    SIGTERM counts as an interrupt: what is in flight was paid for.
    """
    loop = asyncio.get_running_loop()
    steps = iter((finish,))

    def interrupt() -> None:
        next(steps, abort)()

    def interrupt_soon(_number: int, _frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(interrupt)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        try:
            loop.add_signal_handler(number, interrupt)
        except NotImplementedError:  # Windows
            signal.signal(number, interrupt_soon)
    try:
        yield
    finally:
        for number, handler in before.items():
            with suppress(NotImplementedError):
                loop.remove_signal_handler(number)
            if handler is not None:  # None: not set from Python
                signal.signal(number, handler)
