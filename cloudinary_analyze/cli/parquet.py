"""Rows of Parquet files as values of JSON.

Binary columns and fields, which often hold whole images, are left out before they are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date, time
from importlib import import_module
from typing import Any, BinaryIO, Final

from cloudinary_analyze.cli.table import name_columns
from cloudinary_analyze.errors import ConfigurationError, describe_reason

_OFFSET: Final = re.compile(r"([+-]\d\d)(\d\d)$")
_ROWS_AT_ONCE: Final = 1000
_BUFFER_BYTES: Final = 2**20  # of each column; otherwise a whole row group is read at once


def read_rows(stream: BinaryIO) -> Iterator[dict[str, Any]]:
    """Yield the rows. Repeated names of columns get numbers, as in CSV.

    Raises:
        ConfigurationError: It is not a readable Parquet file, or pyarrow is not installed.
    """
    try:
        # by name: the library has no types
        arrow, parquet = import_module("pyarrow"), import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            f"Parquet needs the package {error.name}, which is not installed: "
            "pip install 'cloudinary-analyze[parquet]'"
        ) from None
    try:
        file = parquet.ParquetFile(stream, buffer_size=_BUFFER_BYTES)
        leaves = (file.schema.column(number) for number in range(len(file.schema)))
        paths = [leaf.path for leaf in leaves if not _is_binary(leaf)]
        for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=paths):
            yield from _read_batch(batch.rename_columns(name_columns(batch.schema.names)))
    except (arrow.ArrowException, OSError) as error:
        raise ConfigurationError(
            f"The input is not a readable Parquet file: {describe_reason(error)}."
        ) from None


def _is_binary(leaf: Any) -> bool:
    return "BYTE_ARRAY" in leaf.physical_type and leaf.logical_type.type == "NONE"


def _read_batch(batch: Any) -> Iterator[dict[str, Any]]:
    try:
        rows = batch.to_pylist()
    except (ValueError, OverflowError):  # Python cannot hold one of the values
        names, columns = batch.schema.names, batch.columns
        rows = [
            {name: _read_scalar(column[row]) for name, column in zip(names, columns, strict=True)}
            for row in range(batch.num_rows)
        ]
    return map(_make_json, rows)


def _read_scalar(scalar: Any) -> Any:
    """Return a value. Times that Python cannot hold become text or numbers, without loss."""
    if not scalar.is_valid:
        return None
    kind = scalar.type
    if hasattr(scalar, "items") and not hasattr(kind, "key_type"):  # a struct
        names = name_columns([field.name for field in kind])
        return {name: _read_scalar(scalar[place]) for place, name in enumerate(names)}
    try:
        return scalar.as_py()
    except (ValueError, OverflowError) as error:
        if hasattr(scalar, "dictionary"):
            return _read_scalar(scalar.value)
        if hasattr(scalar, "values"):  # a list, or the pairs of a map
            entries = map(_read_scalar, scalar.values)
            if hasattr(kind, "key_type"):
                return [[*pair.values()] for pair in entries]
            return [*entries]
        if hasattr(scalar, "as_buffer"):
            return bytes(scalar.as_buffer()).decode(errors="surrogateescape")
        if isinstance(error, OverflowError):
            return scalar.value
        day, space, clock = str(scalar.cast("string")).partition(" ")  # nanoseconds
        clock = _OFFSET.sub(r"\1:\2", clock.replace("Z", "+0000"))
        return f"{day}T{clock}" if space else day


def _make_json(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, dict):
        return {str(name): _make_json(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_make_json(entry) for entry in value]
    if isinstance(value, date | time):
        return value.isoformat()
    if getattr(value, "nanoseconds", None) is not None:  # with pandas, arrow returns its type
        return str(value.value if value.nanoseconds else value.to_pytimedelta())
    return str(value)
