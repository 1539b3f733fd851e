"""Results as tables: JSON Lines, CSV or Parquet, one row per result, written record by record."""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterable, Mapping
from importlib import import_module
from io import TextIOWrapper
from typing import Any, BinaryIO, Final, Literal, TypeAlias

import attrs

from cloudinary_analyze.errors import ConfigurationError
from cloudinary_analyze.results.files import open_replacement, read_records
from cloudinary_analyze.results.findings import NOTHING, read_findings, read_number
from cloudinary_analyze.results.records import dump_record

__all__ = [
    "COLUMNS",
    "ExportFormat",
    "OwnColumns",
    "build_row",
    "export_results",
    "find_own_columns",
    "read_records",
    "write_records",
]

ExportFormat = Literal["jsonl", "csv", "parquet"]

COLUMNS: Final[Mapping[str, type[Any]]] = {
    "index": int,
    "file": str,
    "line": int,
    "source": str,
    "item_key": str,
    "model": str,
    "status": str,
    "caption": str,
    "labels": str,
    "top_score": float,
    "answers": str,
    "rejected": bool,
    "quality": str,
    "quality_score": float,
    "seconds": float,
    "restored": bool,
    "units_used": int,
    "error_type": str,
    "error_status": int,
    "error_code": str,
    "error_message": str,
    "may_be_charged": bool,
    "request_id": str,
    "entity": str,
    "key": str,
    "limits": str,
    "analysis": str,
}
"""The columns of every table, after those of the input."""

MOST_OWN_COLUMNS: Final = 1000
SEPARATOR: Final = "; "  # between the labels of one cell

# Characters that begin a formula in a spreadsheet. Some skip tabs and carriage returns.
_FORMULA_STARTS: Final = tuple("=+-@\t\r\n＝＋－＠")
_NUMBER: Final = re.compile(r"[+-]\d+(\.\d+)?([eE][+-]?\d+)?", re.ASCII)  # for example, a longitude
_GROUP_ROWS: Final = 10_000
_GROUP_CHARACTERS: Final = 16 * 2**20  # bytes of analyses; a Parquet row group ends at either limit
_LARGEST_INTEGER: Final = 2**63 - 1


@attrs.frozen
class OwnColumns:
    """The columns of the input in a table.

    Attributes:
        names: The names of the columns in the input, mapped to those in the table.
        kinds: The types of the cells, by the names in the table.
    """

    names: Mapping[str, str] = attrs.field(factory=dict)
    kinds: Mapping[str, type[Any]] = attrs.field(factory=dict)


NO_COLUMNS: Final = OwnColumns()


def find_own_columns(rows: Iterable[Mapping[str, Any]]) -> OwnColumns:
    """Return the first `MOST_OWN_COLUMNS` columns of the rows of an input.

    A column has a type if all of its values have it, otherwise it is text. A column with a name in
    `COLUMNS` gets the prefix ``input_``.
    """
    found: dict[str, type[Any] | None] = {}
    for row in rows:
        for name, value in row.items():
            if name in found or len(found) < MOST_OWN_COLUMNS:
                found[name] = _join_kinds(found.get(name), value)
    names: dict[str, str] = {}
    taken = {*COLUMNS, *found}
    for name in found:
        unique = name.encode(errors="replace").decode()
        while (unique != name and unique in taken) or unique in COLUMNS:
            unique = f"input_{unique}"
        taken.add(unique)
        names[name] = unique
    return OwnColumns(names, {names[name]: kind or str for name, kind in found.items()})


def _join_kinds(kind: type[Any] | None, value: Any) -> type[Any] | None:
    """Return the type of a column to which a value is added."""
    if value is None:
        return kind
    new: type[Any] = type(value) if type(value) in {bool, int, float} else str
    if new is int and not _fits(value):
        new = str
    if kind is None or kind is new:
        return new
    return float if {kind, new} == {int, float} else str


def export_results(
    records: Iterable[Mapping[str, Any]],
    path: str | os.PathLike[str],
    format: ExportFormat,  # noqa: A002
    *,
    own: OwnColumns = NO_COLUMNS,
) -> int:
    """Write records as a table.

    JSON Lines keeps every field. CSV and Parquet have the columns of the input and those of
    `COLUMNS`. ``labels`` contains each label once, highest score first. ``answers`` has lines of
    ``question: answer``. ``units_used`` is the cost of the response. ``limits`` and ``analysis``
    are JSON. In CSV, an apostrophe precedes text that a spreadsheet would interpret as a formula and
    not as a number.

    Args:
        records: The records, for example from `read_records`. They are read lazily, in bounded
            memory.
        path: The file. It is replaced only once the new file is complete.
        format: ``"jsonl"``, ``"csv"`` or ``"parquet"``.
        own: The columns of the input, for a table; see `find_own_columns`. Default: none.

    Returns:
        The number of rows.

    Raises:
        ConfigurationError: The format is unknown, or the [parquet] extra is missing.
        OSError: The file cannot be written.
    """
    write = _choose_writer(format)
    with open_replacement(path) as stream:
        return write(records, stream, own)


def write_records(
    records: Iterable[Mapping[str, Any]],
    stream: BinaryIO,
    format: ExportFormat,  # noqa: A002
    *,
    own: OwnColumns = NO_COLUMNS,
) -> int:
    """Write records to an open stream, as `export_results` does to a file.

    Args:
        records: See `build_record`.
        stream: Where to write; the caller closes it.
        format: ``"jsonl"``, ``"csv"`` or ``"parquet"``.
        own: The columns of the input to include. Default: none.

    Returns:
        The number of records.

    Raises:
        ConfigurationError: The format is unknown, or pyarrow is not installed.
    """
    return _choose_writer(format)(records, stream, own)


_Write: TypeAlias = "Callable[[Iterable[Mapping[str, Any]], BinaryIO, OwnColumns], int]"


def _choose_writer(format_name: str) -> _Write:
    writers: dict[str, _Write] = {
        "jsonl": _write_jsonl,
        "csv": _write_csv,
        "parquet": _write_parquet,
    }
    if format_name not in writers:
        raise ConfigurationError(f"Unknown format {format_name!r}. Pass jsonl, csv or parquet.")
    return writers[format_name]


def build_row(record: Mapping[str, Any], own: OwnColumns = NO_COLUMNS) -> dict[str, Any]:
    """Return the row of a record: the input's columns and `COLUMNS`, each of its type or ``None``.

    Args:
        record: See `build_record`.
        own: The columns of the input to include. Default: none.
    """
    analysis, error = record.get("analysis"), record.get("error")
    findings = NOTHING if analysis is None else read_findings(analysis)
    error = error if isinstance(error, Mapping) else {}
    scores = [mark.score for mark in findings.marks if mark.score is not None]
    quality = findings.quality
    row: dict[str, Any] = {
        **{name: record.get(name) for name in COLUMNS},
        "caption": findings.caption,
        "labels": SEPARATOR.join(findings.labels) if findings.marks else None,
        "top_score": max(scores, default=None),
        "answers": "\n".join(
            answer.value if answer.question is None else f"{answer.question}: {answer.value}"
            for answer in findings.answers
        )
        or None,
        "rejected": findings.rejected,
        "quality": None if quality is None else quality.level,
        "quality_score": None if quality is None else quality.score,
        "error_type": error.get("type"),
        "error_status": error.get("status"),
        "error_code": error.get("code"),
        "error_message": error.get("message"),
        "may_be_charged": error.get("ambiguous"),
        "units_used": _add_units(record.get("limits")),
        "limits": _dump_json(record.get("limits") or None),
        "analysis": _dump_json(analysis),
    }
    values = record.get("input")
    values = values if isinstance(values, Mapping) else {}
    return {
        **{
            unique: _read_cell(_read_own(values.get(name), own.kinds[unique]), own.kinds[unique])
            for name, unique in own.names.items()
        },
        **{name: _read_cell(row[name], kind) for name, kind in COLUMNS.items()},
    }


def _add_units(limits: Any) -> int | None:
    """Return the cost of a response. ``None`` if not sent."""
    used = [
        limit["used_by_request"]
        for limit in (limits if isinstance(limits, list) else ())
        if isinstance(limit, Mapping) and isinstance(limit.get("used_by_request"), int)
    ]
    return sum(used) if used else None


def _read_own(value: Any, kind: type[Any]) -> Any:
    """Return a value of the input for a column. In a text column, other values become JSON."""
    if value is None or kind is not str or isinstance(value, str):
        return value
    return _dump_json(value)


def _dump_json(value: Any) -> str | None:
    return None if value is None else dump_record(value).decode().rstrip("\n")


def _read_cell(value: Any, kind: type[Any]) -> Any:
    """Return a value with the column's type. ``None`` for a value that does not fit."""
    if kind is float:
        return read_number(value)
    if kind is str:
        # JSON can contain an unpaired surrogate, which UTF-8 cannot encode
        return None if value is None else str(value).encode(errors="replace").decode()
    if kind is int and (isinstance(value, bool) or not _fits(value)):
        return None
    return value if isinstance(value, kind) else None


def _fits(value: Any) -> bool:
    return isinstance(value, int) and -_LARGEST_INTEGER <= value <= _LARGEST_INTEGER


def _write_jsonl(records: Iterable[Mapping[str, Any]], stream: BinaryIO, _own: OwnColumns) -> int:
    count = 0
    for record in records:
        stream.write(dump_record(record))
        count += 1
    return count


def _write_csv(records: Iterable[Mapping[str, Any]], stream: BinaryIO, own: OwnColumns) -> int:
    text = TextIOWrapper(stream, encoding="utf-8", newline="")
    # all texts are quoted, because a spreadsheet may split cells at semicolons
    writer = csv.writer(text, quoting=csv.QUOTE_NONNUMERIC, lineterminator="\n")
    writer.writerow([*map(_guard, own.kinds), *COLUMNS])
    count = 0
    for record in records:
        writer.writerow([_guard(value) for value in build_row(record, own).values()])
        count += 1
    text.detach()
    return count


def _guard(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    if (
        isinstance(value, str)
        and value.startswith(_FORMULA_STARTS)
        and not _NUMBER.fullmatch(value)
    ):
        return f"'{value}"
    return "" if value is None else value


def _write_parquet(records: Iterable[Mapping[str, Any]], stream: BinaryIO, own: OwnColumns) -> int:
    try:
        # imported by name, because the library has no types
        arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"Parquet needs the package {error.name}, which is not installed: "
            "pip install 'cloudinary-analyze[parquet]'"
        ) from None
    types = {int: arrow.int64(), float: arrow.float64(), bool: arrow.bool_(), str: arrow.string()}
    schema = arrow.schema([(name, types[kind]) for name, kind in {**own.kinds, **COLUMNS}.items()])
    count = characters = 0
    rows: list[dict[str, Any]] = []
    with parquet.ParquetWriter(stream, schema, compression="zstd") as writer:
        for record in records:
            row = build_row(record, own)
            rows.append(row)
            count += 1
            characters += len(row["analysis"] or "") + sum(
                len(row[name] or "") for name, kind in own.kinds.items() if kind is str
            )
            if len(rows) >= _GROUP_ROWS or characters >= _GROUP_CHARACTERS:
                writer.write_table(arrow.Table.from_pylist(rows, schema))
                rows, characters = [], 0
        if rows:
            writer.write_table(arrow.Table.from_pylist(rows, schema))
    return count
