"""Bulk work beside the stream itself: reading the input, and what is written of each outcome."""

from cloudinary_analyze.bulk.input import (
    InputFormat,
    InputItem,
    InputLine,
    detect_format,
    read_input,
    read_source,
)
from cloudinary_analyze.bulk.records import build_record, dump_record
from cloudinary_analyze.bulk.sqlite import SQLiteLedger

__all__ = [
    "InputFormat",
    "InputItem",
    "InputLine",
    "SQLiteLedger",
    "build_record",
    "detect_format",
    "dump_record",
    "read_input",
    "read_source",
]
