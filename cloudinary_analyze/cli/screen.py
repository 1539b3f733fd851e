"""What a person sees while a command runs: messages, progress, and the answer to Ctrl-C.

Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import asyncio
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from enum import IntEnum
from types import FrameType, TracebackType
from typing import Any, Final, Self, TextIO, cast

import attrs
from rich.console import (
    Console,
    ConsoleOptions,
    ConsoleRenderable,
    RenderableType,
    RenderHook,
    RenderResult,
)
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
from rich.segment import Segment
from rich.text import Text

from cloudinary_analyze._wire import codec
from cloudinary_analyze.cli.outlet import MessageStream, escape_controls
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


class _Cleaned:
    """Something to print, without characters of its texts that a terminal interprets."""

    def __init__(self, inner: RenderableType) -> None:
        self._inner = inner

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for segment in console.render(self._inner, options):
            if segment.control:
                yield segment
            else:
                yield Segment(escape_controls(segment.text), segment.style)


class _Cleaner(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Cleaned(renderable) for renderable in renderables]


def build_console(stream: TextIO | None = None) -> Console:
    """Return a console; on stderr, as stderr is now, unless there is another stream.

    Texts from servers, inputs and strangers are printed without control characters. Messages on
    stderr never wait and never fail.
    """
    file = MessageStream(sys.stderr) if stream is None else stream
    console = Console(file=cast(TextIO, file), highlight=False)
    console.push_render_hook(_Cleaner())
    return console


def finish_messages(console: Console) -> None:
    """Wait until messages are written, but not for a reader that does not read."""
    if isinstance(console.file, MessageStream):
        console.file.finish()


@contextmanager
def showing_results() -> Iterator[None]:
    """Print results on stdout inside the block.

    Raises:
        CommandError: They cannot be printed.
    """
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        raise CommandError(explain_stdout(error), exit_code=ExitCode.STOPPED) from None


def explain_stdout(error: OSError) -> str:
    """Return the sentence for an error of stdout."""
    if isinstance(error, BrokenPipeError):
        return "Standard output was closed by its reader."
    return f"Standard output could not be written: {error.strerror}."


def print_json(value: Any) -> None:
    """Print a value on stdout as one line of JSON."""
    print(encode_json(value))


def encode_json(value: Any) -> str:
    """Return JSON for stdout, in ASCII if stdout is not UTF-8."""
    if (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf8"):
        return codec.dumps(value).decode()
    return json.dumps(value)


def is_interactive(stream: TextIO | None) -> bool:
    """Whether a person looks at a stream, on a terminal that can redraw."""
    if stream is None or stream.closed or not stream.isatty():
        return False
    return not Console(file=stream).is_dumb_terminal


def check_stdout() -> None:
    """See beforehand that there is a standard output.

    Raises:
        CommandError: It is closed.
    """
    if sys.stdout is None or sys.stdout.closed:
        raise CommandError("Standard output is closed, so no result can be shown.")


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
    return escape_controls(f"quota left: {', '.join(left)}") if left else ""


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


ENDING_SIGNALS: Final = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)
)
SIGNALS: Final = (signal.SIGINT, *ENDING_SIGNALS)


@contextmanager
def handle_interrupts(
    finish: Callable[[], object],
    abort: Callable[[], object],
    end: Callable[[], object] | None = None,
) -> Iterator[None]:
    """Call ``finish`` at the first signal, and another function at each later one, on the loop.

    SIGTERM and SIGHUP count as interrupts, because what is in flight was paid for. When one of them
    comes again, the process shall end at once.

    Args:
        finish: Finishes what is in flight.
        abort: Called at a second Ctrl-C.
        end: Called at a second SIGTERM or SIGHUP; default: ``abort``.
    """
    loop = asyncio.get_running_loop()
    begun = False

    def interrupt(number: int) -> None:
        nonlocal begun
        if not begun:
            begun = True
            finish()
        elif number in ENDING_SIGNALS and end is not None:
            end()
        else:
            abort()

    def interrupt_soon(number: int, _frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(interrupt, number)

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        try:
            loop.add_signal_handler(number, interrupt, number)
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
