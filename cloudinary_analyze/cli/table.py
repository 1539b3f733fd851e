"""Tables of text (CSV), read strictly.

An invalid record yields a reason instead of its cells. If it is unclear where records end, for
example after an open quote, it raises.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Final

from cloudinary_analyze.cli.text import (
    CUT,
    LONGEST_LINE,
    list_names,
    make_encodable,
    read_source,
)
from cloudinary_analyze.errors import ConfigurationError, InvalidRequestError, describe_reason

LONGEST_RECORD: Final = 100  # lines of a record
USUAL_COLUMNS: Final = ("url", "uri", "source")

_DELIMITERS: Final = (",", ";", "\t", "|")
_SEPARATOR_LINE: Final = re.compile(r'"?sep=(.)"?\s*', re.IGNORECASE)

csv.field_size_limit(2**31 - 1 if sys.platform == "win32" else sys.maxsize)  # of the process


def read_header(
    lines: Iterator[tuple[int, str]], column: str | None
) -> tuple[list[str], str, int] | None:
    """Return the header of a CSV, its delimiter and its last line. ``None`` if there is no header."""
    delimiters: Sequence[str] = _DELIMITERS
    text, quoted = "", False
    for number, line in lines:
        if not quoted and not line.strip():
            continue
        if number == 1 and (separator := _SEPARATOR_LINE.fullmatch(line)):
            delimiters = separator[1]
            continue
        text += line
        quoted = text.count('"') % 2 == 1
        if not quoted:
            break
        if number > LONGEST_RECORD or len(text) > LONGEST_LINE:
            raise ConfigurationError("The CSV header has an open quote.")
    else:
        if not text:
            return None
        raise ConfigurationError("The CSV header has an open quote.")
    headers: list[tuple[bool, int, list[str], str]] = []
    reason = ""
    for delimiter in delimiters:
        try:
            header = next(_build_csv_reader(text.splitlines(keepends=True), delimiter))
        except csv.Error as error:
            reason = describe_reason(error)
            continue
        header = [name.strip() for name in header]
        folded = {name.casefold() for name in header}
        wanted = set(USUAL_COLUMNS) if column is None else {column.strip().casefold()}
        headers.append((bool(folded & wanted), len(header), header, delimiter))
    if not headers:
        raise ConfigurationError(f"The CSV header cannot be read: {reason}.")
    _, _, header, delimiter = max(headers, key=lambda entry: entry[:2])
    return header, delimiter, number


def _build_csv_reader(lines: Any, delimiter: str) -> Iterator[list[str]]:
    return csv.reader(lines, delimiter=delimiter, skipinitialspace=delimiter != "\t", strict=True)


def read_records(
    lines: Iterator[tuple[int, str]], delimiter: str, place: int
) -> Iterator[tuple[int, list[str] | str]]:
    """Yield the first line of each CSV record, with its cells or its error.

    Raises:
        ConfigurationError: It is in doubt where records begin and end.
    """
    record: list[tuple[int, str]] = []
    length = 0

    def pull() -> Iterator[str]:
        nonlocal length
        for number, text in lines:
            record.append((number, text))
            length += len(text)
            if text.endswith(f"{CUT}\n"):
                limit = LONGEST_LINE // 2**20
                raise ConfigurationError(f"Line {number} of the CSV is longer than {limit} MiB.")
            if len(record) > LONGEST_RECORD or length > LONGEST_LINE:
                first = record[0][0]
                bound = f"{LONGEST_RECORD} lines or {LONGEST_LINE // 2**20} MiB"
                raise _refuse_record(
                    record, f"is longer than {bound}. Is a quote open in line {first}?"
                )
            yield text

    reader = _build_csv_reader(pull(), delimiter)
    while True:
        record.clear()
        length = 0
        try:
            row = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            quotes = sum(text.count('"') for _, text in record)
            if len(record) == 1 and quotes % 2 == 0:
                yield record[0][0], f"The record is not valid CSV: {describe_reason(error)}."
                continue
            first = record[0][0]
            raise _refuse_record(
                record,
                f"is not valid CSV: {describe_reason(error)}. Is a quote open in line {first}?",
            ) from None
        for number, text in record[1:]:
            cells = text.partition('"')[0].split(delimiter)
            if place < len(cells) and _is_source(cells[place]):
                raise _refuse_record(
                    record,
                    f"seems to contain another record in line {number}. Is a quote open in line "
                    f"{record[0][0]}?",
                )
        yield record[0][0], row


def _refuse_record(record: Sequence[tuple[int, str]], reason: str) -> ConfigurationError:
    first, last = record[0][0], record[-1][0]
    where = f"line {first}" if first == last else f"lines {first} to {last}"
    return ConfigurationError(f"The CSV record in {where} {reason} Nothing was sent.")


def _is_source(text: str) -> bool:
    try:
        read_source(text)
    except InvalidRequestError:
        return False
    return True


def name_columns(header: Sequence[str]) -> list[str]:
    """Return a different name for each column."""
    names: dict[str, None] = {}
    following: dict[str, int] = {}  # the next number of a repeated name
    for number, name in enumerate(header, start=1):
        base = make_encodable(name) or f"column_{number}"
        unique, count = base, following.get(base, 2)
        while unique in names:
            unique = f"{base}_{count}"
            count += 1
        following[base] = count
        names[unique] = None
    return list(names)


def find_column(header: list[str], column: str | None, option: str) -> int:
    """Return the position of a column.

    Args:
        header: The names of the columns.
        column: The wanted name, in any case; ``None``: one of `USUAL_COLUMNS`, or the only one.
        option: The option that named it.

    Raises:
        ConfigurationError: It is missing.
    """
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
        f"The CSV input has no column {wanted!r}; its columns are {list_names(header)}. "
        f"Pass the right name with {option}."
    )
