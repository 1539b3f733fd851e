"""Bulk input: plain text, CSV, JSON Lines or Parquet, read lazily into numbered sources.

This module reads binary streams and opens none. An invalid line becomes a value with its error, and
the rest is read. If it is unclear where records end, for example after an open quote, it raises.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePath
from typing import Any, BinaryIO, Final, Literal

import attrs

from cloudinary_analyze._wire import codec
from cloudinary_analyze.cli.parquet import read_rows
from cloudinary_analyze.cli.table import (
    USUAL_COLUMNS,
    find_column,
    name_columns,
    read_header,
    read_records,
)
from cloudinary_analyze.cli.text import (
    UNDECODED,
    explain_text,
    list_names,
    make_encodable,
    read_count,
    read_lines,
    read_source,
)
from cloudinary_analyze.errors import ConfigurationError, InvalidRequestError
from cloudinary_analyze.results.records import InputLine

InputFormat = Literal["text", "csv", "jsonl", "parquet"]

DEEPEST: Final = 1000  # levels of nesting in a line, so that its output can be read back
SHOWN_TEXT: Final = 500  # characters that are kept of an invalid line
FORMATS: Final[Mapping[str, InputFormat]] = {
    "": "text",
    ".txt": "text",
    ".csv": "csv",
    ".tsv": "csv",
    ".json": "jsonl",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".pq": "parquet",
}


@attrs.frozen(kw_only=True)
class Columns:
    """The roles of the columns or fields of a row.

    Attributes:
        source: The column of the source. ``None``: the first of ``url``, ``uri`` and ``source``
            that exists, or the only column of a CSV file.
        name: The column that identifies an item instead of its source.
        keep: The columns that are kept for the output. ``None``: all.
    """

    source: str | None = None
    name: str | None = None
    keep: tuple[str, ...] | None = None


def detect_format(name: str) -> InputFormat:
    """Return the format of a file by its extension, before which ``.gz`` is ignored.

    Raises:
        ConfigurationError: The extension is unknown.
    """
    path = PurePath(name)
    if path.suffix.lower() == ".gz":
        path = path.with_suffix("")
    found = FORMATS.get(path.suffix.lower())
    if found is None:
        known = ", ".join(filter(None, FORMATS))
        raise ConfigurationError(
            f"Unknown extension {path.suffix!r} of the input {name}. Known: {known}, each also "
            "with .gz. Or name its format with --input-format."
        )
    return found


def read_input(
    stream: BinaryIO,
    *,
    input_format: InputFormat = "text",
    columns: Columns | None = None,
    file: str | None = None,
) -> Iterator[InputLine]:
    """Read sources from a stream, lazily.

    Plain text has one source per line; blank lines and lines that begin with ``#`` are skipped. CSV
    has a header line, which may follow a ``sep=`` line. Its delimiter is a comma, semicolon, tab or
    pipe, found from the header. JSON Lines has one object per line. Text is UTF-8, with or without
    a byte order mark. Parquet has one row per source; columns of binary data are not read.

    Args:
        stream: Bytes. Text is read line by line; Parquet needs a stream that can seek.
        input_format: How to read it.
        columns: The roles of its columns. A dotted name, such as ``image.url``, is a field of an
            object in JSON Lines and Parquet. Not for plain text.
        file: The name of the file, for its lines.

    Yields:
        A line for each source, invalid ones included.

    Raises:
        ConfigurationError: The input as a whole cannot be read: it is not text, a column is
            missing, or an open quote leaves the borders of its records in doubt.
    """
    reader = _Reader(columns or Columns(), file)
    if input_format == "parquet":
        return reader.read_parquet(stream)
    lines = read_lines(stream)
    if input_format == "csv":
        return reader.read_csv(lines)
    if input_format == "jsonl":
        return reader.read_jsonl(lines)
    return reader.read_text(lines)


@attrs.frozen
class _Reader:
    """Builds the lines of one input."""

    columns: Columns
    file: str | None

    def read_text(self, lines: Iterator[tuple[int, str]]) -> Iterator[InputLine]:
        for number, line in lines:
            text = line.strip()
            if text and not text.startswith("#"):
                yield self._build_line(number, text)

    def read_csv(self, lines: Iterator[tuple[int, str]]) -> Iterator[InputLine]:
        start = read_header(lines, self.columns.source)
        if start is None:
            return
        header, delimiter, _ = start
        place = find_column(header, self.columns.source, "--column")
        name_place = None
        if self.columns.name is not None:
            name_place = find_column(header, self.columns.name, "--key-column")
        kept = list(enumerate(name_columns(header)))
        if self.columns.keep is not None:
            places = {find_column(header, name, "--keep") for name in self.columns.keep}
            kept = [(index, name) for index, name in kept if index in places]
        for number, row in read_records(lines, delimiter, place):
            if isinstance(row, str):
                yield self._build_bad_line(number, "", row)
                continue
            if not any(map(str.strip, row)):
                continue
            text = row[place].strip() if place < len(row) else ""
            reason = None
            if any(row[len(header) :]):
                reason = (
                    f"The record has {len(row)} cells, but the header names {len(header)} columns. "
                    f"Quote cells that contain {delimiter!r}."
                )
            elif not text:
                reason = f"The column {header[place]!r} is empty."
            elif any(map(UNDECODED.search, row)):
                reason = "The record is not UTF-8."
            columns = {name: make_encodable(row[i]) for i, name in kept if i < len(row)}
            if reason is not None:
                yield self._build_bad_line(number, delimiter.join(row), reason, columns)
                continue
            if name_place is None:
                yield self._build_line(number, text, columns)
            else:
                name = row[name_place].strip() if name_place < len(row) else ""
                yield self._build_named_line(number, text, columns, name, header[name_place])

    def read_jsonl(self, lines: Iterator[tuple[int, str]]) -> Iterator[InputLine]:
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
            if reason := explain_text(text):
                yield self._build_bad_line(number, text, reason)
                continue
            try:
                record: Any = codec.loads(text.encode())
            except (ValueError, RecursionError):
                yield self._build_bad_line(number, text, "The line is not valid JSON.")
                continue
            reason = None
            if not isinstance(record, dict):
                reason = "The line is JSON, but not an object."
            elif text.count("{") + text.count("[") > DEEPEST and codec.is_deep(record, DEEPEST):
                reason = f"The line is nested in more than {DEEPEST} levels."
            if reason is not None:
                yield self._build_bad_line(number, text, reason)
            else:
                yield self._build_object_line(number, record, text)

    def read_parquet(self, stream: BinaryIO) -> Iterator[InputLine]:
        for number, record in enumerate(read_rows(stream), start=1):
            yield self._build_object_line(number, record, "")

    def _build_object_line(self, number: int, record: dict[str, Any], text: str) -> InputLine:
        source_column = self.columns.source
        names = USUAL_COLUMNS if source_column is None else (source_column,)
        name = next((name for name in names if _find_field(record, name) is not None), None)
        text = text or repr(record)[:SHOWN_TEXT]
        columns = record
        if self.columns.keep is not None:
            found = {name: _find_field(record, name) for name in self.columns.keep}
            columns = {name: value for name, value in found.items() if value is not None}
        if name is None:
            reason = (
                f"The field {names[0]!r} is missing; the fields are {list_names(list(record))}."
            )
            return self._build_bad_line(number, text, reason, columns)
        value = _find_field(record, name)
        if not isinstance(value, str) or not value.strip():
            reason = f"The field {name!r} must be text."
            return self._build_bad_line(number, text, reason, columns)
        if self.columns.name is None:
            return self._build_line(number, value.strip(), columns)
        known_as = _find_field(record, self.columns.name)
        known_as = "" if known_as is None else known_as
        if isinstance(known_as, bool) or not isinstance(known_as, str | int):
            reason = (
                f"The field {self.columns.name!r}, which identifies the images, must be text or an "
                "integer."
            )
            return self._build_bad_line(number, text, reason, columns)
        return self._build_named_line(
            number, value.strip(), columns, str(known_as).strip(), self.columns.name
        )

    def _build_named_line(
        self, number: int, text: str, columns: dict[str, Any], name: str, column: str
    ) -> InputLine:
        if not name:
            reason = f"The column {column!r}, which identifies the images, is empty."
            return self._build_bad_line(number, text, reason, columns)
        return attrs.evolve(self._build_line(number, text, columns), name=name)

    def _build_line(
        self, number: int, text: str, columns: dict[str, Any] | None = None
    ) -> InputLine:
        try:
            source = read_source(text)
        except InvalidRequestError as error:
            reason = explain_text(text) or error.message
            return self._build_bad_line(number, text, reason, columns)
        return InputLine(number, text, source, None, None, self.file, columns or None)

    def _build_bad_line(
        self, number: int, text: str, reason: str, columns: dict[str, Any] | None = None
    ) -> InputLine:
        shown = make_encodable(text[:SHOWN_TEXT])
        error = InvalidRequestError(reason)
        return InputLine(number, shown, error=error, file=self.file, columns=columns or None)


def _find_field(value: Any, name: str) -> Any:
    """Return a field of an object, by its name or by a dotted path. ``None`` if it is missing.

    The names on the path may contain dots, too.
    """
    if isinstance(value, dict):
        if name in value:
            return value[name]
        for place in (place for place, char in enumerate(name) if char == "."):
            found = _find_field(value.get(name[:place]), name[place + 1 :])
            if found is not None:
                return found
    elif isinstance(value, list):
        first, _, rest = name.partition(".")
        number = read_count(first)
        if number is not None and number < len(value):
            return _find_field(value[number], rest) if rest else value[number]
    return None
