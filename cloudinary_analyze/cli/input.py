"""Bulk input: plain text, CSV or JSON Lines, read lazily into numbered sources.

Reads any binary stream and opens none. One bad line is a value with its error, so that it never
stops the rest; only what makes the whole input unreadable raises.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import PurePath
from typing import Any, BinaryIO, Final, Literal

import attrs

from cloudinary_analyze._wire import codec
from cloudinary_analyze.errors import ConfigurationError, InvalidRequestError
from cloudinary_analyze.requests import Asset, Uri
from cloudinary_analyze.results.records import InputLine

InputFormat = Literal["text", "csv", "jsonl"]

LONGEST_LINE: Final = 2**20  # bytes; what is longer is no line of text
SHOWN_TEXT: Final = 500  # characters that are kept of a bad line
USUAL_COLUMNS: Final = ("url", "uri", "source")
ASSET_PREFIX: Final = "asset:"

_FORMATS: Final[Mapping[str, InputFormat]] = {
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "jsonl",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
_DELIMITERS: Final = (",", ";", "\t")
_BOM: Final = b"\xef\xbb\xbf"
_BINARY_STARTS: Final = (
    b"\xff\xfe",  # UTF-16
    b"\xfe\xff",
    b"\x1f\x8b",  # gzip
    b"BZh",
    b"\xfd7zXZ",
    b"\x28\xb5\x2f\xfd",  # zstd
    b"PK\x03\x04",  # zip, and so the spreadsheets
    b"\x89PNG",
    b"\xff\xd8\xff",  # JPEG
    b"PAR1",
)
_CUT: Final = "\0"  # ends a line that was cut short; no URL, id or JSON can hold it
_UNDECODED = re.compile("[\ud800-\udfff]")


def detect_format(name: str) -> InputFormat:
    """Return the format of a file by its extension; plain text if it tells nothing."""
    return _FORMATS.get(PurePath(name).suffix.lower(), "text")


def read_source(text: str) -> Uri | Asset:
    """Return the source that a text names: an http(s) URL or ``asset:ID``.

    Raises:
        InvalidRequestError: It is neither.
    """
    text = text.strip()
    if text[: len(ASSET_PREFIX)].lower() == ASSET_PREFIX:
        return Asset(text[len(ASSET_PREFIX) :].strip())
    return Uri(text)


def read_input(
    stream: BinaryIO,
    *,
    input_format: InputFormat = "text",
    column: str | None = None,
    name_column: str | None = None,
) -> Iterator[InputLine]:
    """Read sources from a stream, lazily.

    Plain text has one source per line; blank lines and lines that begin with ``#`` are skipped.
    CSV has a header line; commas, semicolons and tabs are told apart by it. JSON Lines has one
    object per line. All are UTF-8, with or without a byte order mark.

    Args:
        stream: Bytes; read line by line, never as a whole.
        input_format: How to read it.
        column: The column or field of the source. Default: the first of ``url``, ``uri`` and
            ``source`` that there is, or a CSV file's only column.
        name_column: The column or field that names an item for good, for sources that change,
            such as signed URLs. Not for plain text.

    Yields:
        A line for each source, bad ones included.

    Raises:
        ConfigurationError: The input as a whole cannot be read: no text, or no such column.
    """
    lines = _read_lines(stream)
    if input_format == "csv":
        return _read_csv(lines, column, name_column)
    if input_format == "jsonl":
        return _read_jsonl(lines, column, name_column)
    return _read_text(lines)


def _read_lines(stream: BinaryIO) -> Iterator[tuple[int, str]]:
    number = 0
    while raw := stream.readline(LONGEST_LINE):
        number += 1
        if number == 1:
            _check_text(raw)
            raw = raw.removeprefix(_BOM)
        cut = len(raw) == LONGEST_LINE and not raw.endswith(b"\n")
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            text = raw.decode(errors="surrogateescape")
        if cut:
            text += f"{_CUT}\n"
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(LONGEST_LINE)
        yield number, text


def _check_text(start: bytes) -> None:
    if start.startswith(_BINARY_STARTS) or b"\0" in start:
        raise ConfigurationError(
            "The input is not a text file. Pass plain text, CSV or JSON Lines in UTF-8; "
            "unpack or convert a compressed file, a spreadsheet or UTF-16 first."
        )


def _read_text(lines: Iterator[tuple[int, str]]) -> Iterator[InputLine]:
    for number, line in lines:
        text = line.strip()
        if text and not text.startswith("#"):
            yield _build_line(number, text)


def _read_csv(
    lines: Iterator[tuple[int, str]], column: str | None, name_column: str | None
) -> Iterator[InputLine]:
    first = next(((number, text) for number, text in lines if text.strip()), None)
    if first is None:
        return
    offset = first[0]  # the lines up to the header; csv's own count begins there with 1
    delimiter = max(_DELIMITERS, key=first[1].count)
    reader = csv.reader(
        chain([first[1]], (text for _, text in lines)),
        delimiter=delimiter,
        skipinitialspace=delimiter != "\t",
    )
    try:
        header = [name.strip() for name in next(reader)]
    except csv.Error as error:
        raise ConfigurationError(f"The CSV header cannot be read: {error}.") from None
    place = _find_column(header, column, "--column")
    name_place = None
    if name_column is not None:
        name_place = _find_column(header, name_column, "--key-column")
    while True:
        number = offset + reader.line_num
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            reason = f"The record that begins here is no CSV ({error}). Is a quote left open?"
            yield _build_bad_line(number, "", reason)
            continue
        text = row[place].strip() if place < len(row) else ""
        if text and name_place is not None:
            name = row[name_place].strip() if name_place < len(row) else ""
            yield _build_named_line(number, text, name, header[name_place])
        elif text:
            yield _build_line(number, text)
        elif any(map(str.strip, row)):
            reason = f"The column {header[place]!r} is empty here."
            yield _build_bad_line(number, delimiter.join(row), reason)


def _find_column(header: list[str], column: str | None, option: str) -> int:
    folded = [name.casefold() for name in header]
    for name in USUAL_COLUMNS if column is None else (column.strip().casefold(),):
        if name in folded:
            return folded.index(name)
    if column is None and len(header) == 1 and "://" not in header[0]:
        return 0
    if any("://" in name for name in header):
        raise ConfigurationError(
            "The CSV input has no header: its first line must name the columns. "
            "If it has one URL per line and nothing else, read it with --input-format text."
        )
    wanted = "url" if column is None else column
    raise ConfigurationError(
        f"The CSV input has no column {wanted!r}; it has {_list(header)}. "
        f"Name the right one with {option}."
    )


def _read_jsonl(
    lines: Iterator[tuple[int, str]], column: str | None, name_column: str | None
) -> Iterator[InputLine]:
    names = USUAL_COLUMNS if column is None else (column,)
    begun = False
    for number, line in lines:
        text = line.strip()
        if not text:
            continue
        if not begun and text.startswith("["):
            raise ConfigurationError(
                "The input is a JSON array. JSON Lines has one object per line; "
                "convert it first, with `jq -c '.[]'` for example."
            )
        begun = True
        yield _read_object(number, text, names, name_column)


def _read_object(
    number: int, text: str, names: tuple[str, ...], name_column: str | None
) -> InputLine:
    if reason := _explain_text(text):
        return _build_bad_line(number, text, reason)
    try:
        record: Any = codec.loads(text.encode())
    except (ValueError, RecursionError):
        return _build_bad_line(number, text, "The line is no JSON.")
    if not isinstance(record, dict):
        return _build_bad_line(number, text, "The line is JSON, but no object.")
    name = next((name for name in names if name in record), None)
    if name is None:
        reason = f"The object has no {names[0]!r}; it has {_list(list(record))}."
        return _build_bad_line(number, text, reason)
    value = record[name]
    if not isinstance(value, str) or not value.strip():
        return _build_bad_line(number, text, f"{name!r} is no text here.")
    if name_column is None:
        return _build_line(number, value.strip())
    known_as = record.get(name_column)
    if isinstance(known_as, bool) or not isinstance(known_as, str | int):
        known_as = ""
    return _build_named_line(number, value.strip(), str(known_as).strip(), name_column)


def _build_named_line(number: int, text: str, name: str, column: str) -> InputLine:
    if not name:
        return _build_bad_line(number, text, f"{column!r}, which names the items, is empty here.")
    return attrs.evolve(_build_line(number, text), name=name)


def _build_line(number: int, text: str) -> InputLine:
    try:
        return InputLine(number, text, read_source(text))
    except InvalidRequestError as error:
        reason = _explain_text(text)
        if reason is None and "\n" in text:
            reason = "The source spans several lines. Is a quote left open?"
        return _build_bad_line(number, text, error.message if reason is None else reason)


def _explain_text(text: str) -> str | None:
    if text.endswith(_CUT):
        return f"The line is longer than {LONGEST_LINE // 2**20} MiB."
    return "The line is not UTF-8." if _UNDECODED.search(text) else None


def _build_bad_line(number: int, text: str, reason: str) -> InputLine:
    shown = text[:SHOWN_TEXT].encode(errors="surrogateescape").decode(errors="replace")
    return InputLine(number, shown, error=InvalidRequestError(reason))


def _list(names: list[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:10])
    return f"{shown}, …" if len(names) > 10 else shown or "none"
