"""Where the command line speaks: results on stdout, all else on stderr; and its exit codes."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import TextIO

from rich.console import Console
from rich.text import Text


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
