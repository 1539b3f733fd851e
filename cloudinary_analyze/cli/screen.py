"""The display of a running command: messages, progress, and the handling of Ctrl-C.

Results go to stdout, everything else to stderr.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from enum import IntEnum
from itertools import pairwise
from types import FrameType
from typing import Annotated, Any, Final, Literal, TextIO, cast

import attrs
from cyclopts import Parameter
from rich.console import (
    Console,
    ConsoleOptions,
    ConsoleRenderable,
    RenderableType,
    RenderHook,
    RenderResult,
)
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from cloudinary_analyze._wire import codec
from cloudinary_analyze.cli.outlet import MessageStream, escape_controls

STANDARD: Final = "-"  # standard input or output, as the name of a file


class ExitCode(IntEnum):
    """The exit codes of the process."""

    DONE = 0
    FAILURES = 1
    USAGE = 2
    STOPPED = 3
    INTERRUPTED = 130


class CommandError(Exception):
    """A command cannot continue. The message is for the user.

    Attributes:
        exit_code: What the process ends with.
    """

    def __init__(self, message: str, *, exit_code: ExitCode = ExitCode.USAGE) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class _Cleaned:
    """A renderable without characters that a terminal interprets."""

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


def build_console(stream: TextIO | None = None) -> MessageConsole:
    """Return a console on a stream. Default: the current stderr.

    Texts from outside are printed without control characters. Messages on stderr never wait and
    never fail.
    """
    file = MessageStream(sys.stderr) if stream is None else stream
    console = MessageConsole(file=cast(TextIO, file), highlight=False)
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
        return "Standard output was closed by the reader."
    return f"Standard output could not be written: {error.strerror}."


def print_json(value: Any) -> None:
    """Print a value on stdout as one line of JSON."""
    print(encode_json(value))


def encode_json(value: Any) -> str:
    """Return JSON for stdout, in ASCII if stdout is not UTF-8."""
    text = codec.dumps(value).decode()
    if (sys.stdout.encoding or "").lower().replace("-", "").startswith("utf8"):
        return text
    return re.sub("[^\0-\x7f]", lambda found: json.dumps(found[0])[1:-1], text)


def is_interactive(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal that can redraw."""
    if stream is None or stream.closed or not stream.isatty():
        return False
    return not Console(file=stream).is_dumb_terminal


def check_stdout() -> None:
    """Check in advance that standard output is open.

    Raises:
        CommandError: It is closed.
    """
    if sys.stdout is None or sys.stdout.closed:
        raise CommandError("Standard output is closed, so no result can be shown.")


def say(console: Console, sentence: str, *, style: str = "") -> None:
    """Print a sentence. Only the terminal wraps it, and it is never read as markup."""
    console.print(Text(sentence, style=style), soft_wrap=True)


def build_table(*headings: str, numbers: Sequence[str] = ()) -> Table:
    """Return a table with columns of text and of numbers. A narrow terminal shows all characters."""
    table = Table()
    for heading in headings:
        table.add_column(heading, overflow="fold")
    for heading in numbers:
        table.add_column(heading, justify="right", overflow="fold")
    return table


class ConsoleHandler(logging.Handler):
    """Prints log records through a console, so that they do not break a progress bar."""

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


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class DisplayOptions:
    """The messages of a run.

    Attributes:
        quiet: Whether to print only warnings, errors and the closing sentence.
        log_format: Whether messages are text or JSON Lines.
    """

    quiet: Annotated[
        bool,
        Parameter(
            name=["--quiet", "-q"],
            help="Print no progress and no tables, only warnings, errors and the closing sentence.",
        ),
    ] = False
    log_format: Annotated[
        Literal["text", "json"],
        Parameter(
            name="--log-format",
            help="Print messages on stderr as text, or as one JSON object per line.",
        ),
    ] = "text"

    def adapt(self, console: Console) -> Console:
        """Make a console print messages in the chosen format from now on."""
        if isinstance(console, MessageConsole):
            console.as_json = self.log_format == "json"
        return console


DEFAULT_DISPLAY: Final = DisplayOptions()


def wants_json(arguments: Sequence[str]) -> bool:
    """Whether a command line that may be invalid asks for messages as JSON Lines."""
    pairs = pairwise(arguments)
    return "--log-format=json" in arguments or ("--log-format", "json") in pairs


_LEVELS: Final = {"red": "error", "yellow": "warning"}


class MessageConsole(Console):
    """A console for messages, which can print them as JSON Lines. Tables are left out then.

    Attributes:
        as_json: Whether messages are JSON Lines.
    """

    as_json: bool = False

    def print(self, *objects: Any, **options: Any) -> None:
        """Print texts; as JSON each is an object with its time, level and message."""
        if not self.as_json:
            super().print(*objects, **options)
            return
        for each in objects:
            if isinstance(each, Text):
                self.log_event(each.plain, level=_LEVELS.get(str(each.style), "info"))

    def log_event(self, message: str, *, level: str = "info", **fields: Any) -> None:
        """Print a message with further fields as JSON."""
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        record = {"time": now, "level": level, "message": message, **fields}
        self.file.write(json.dumps(record, default=str) + "\n")
        self.file.flush()


def report_progress(console: Console, text: str, fields: Mapping[str, Any]) -> None:
    """Print a line of progress."""
    if isinstance(console, MessageConsole) and console.as_json:
        console.log_event(text, event="progress", **fields)
    else:
        say(console, text, style="dim")


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

    SIGTERM and SIGHUP count as interrupts, because calls in flight are paid for. If one of them
    arrives again, the process must end at once. A signal that is ignored when the command starts
    stays ignored: SIGHUP under ``nohup``, and SIGINT in a background job of a script.

    Args:
        finish: Finishes the calls in flight.
        abort: Called at a second Ctrl-C.
        end: Called at a second SIGTERM or SIGHUP. Default: ``abort``.
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

    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    before = {number: old for number, old in handlers.items() if old is not signal.SIG_IGN}
    for number in before:
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
            if handler is not None:  # None: the handler was not set from Python
                signal.signal(number, handler)
