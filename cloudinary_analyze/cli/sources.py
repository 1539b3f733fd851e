"""The sources of a run's lines: a file, standard input, or the emulator's gallery."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

from cloudinary_analyze.cli.feed import LineSource
from cloudinary_analyze.cli.input import InputFormat, detect_format, read_input
from cloudinary_analyze.cli.screen import CommandError
from cloudinary_analyze.requests import Uri
from cloudinary_analyze.results.records import InputLine

STANDARD: Final = "-"


def open_source(
    name: str,
    *,
    input_format: InputFormat | None,
    column: str | None,
    key_column: str | None = None,
) -> LineSource:
    """Return the source that a name on the command line means.

    Of a file the beginning is read, so that one that is no such text is refused at once.

    Raises:
        CommandError: There is no such file, or the options do not fit it.
        ConfigurationError: It is no text, or has no such column.
    """
    chosen = input_format or detect_format(name)
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
