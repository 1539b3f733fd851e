"""Text of any origin: its lines, its sources, and what is wrong with them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import BinaryIO, Final

from cloudinary_analyze.errors import ConfigurationError, InvalidRequestError
from cloudinary_analyze.requests import Asset, Uri

LONGEST_LINE: Final = 64 * 2**20  # bytes
ASSET_PREFIX: Final = "asset:"
MOST_DIGITS: Final = 1000
CUT: Final = "\0"  # ends a line that was cut short; no URL, id or JSON can hold it
UNDECODED: Final = re.compile("[\ud800-\udfff]")

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


def read_source(text: str) -> Uri | Asset:
    """Return the source that a text names: an http(s) URL or ``asset:ID``.

    Raises:
        InvalidRequestError: It is neither.
    """
    text = text.strip()
    if text[: len(ASSET_PREFIX)].lower() == ASSET_PREFIX:
        return Asset(text[len(ASSET_PREFIX) :].strip())
    try:
        return Uri(text)
    except InvalidRequestError as error:
        written = error.message.replace("Asset(asset_id)", f"{ASSET_PREFIX}ID")
        raise InvalidRequestError(written) from None


def read_count(text: str) -> int | None:
    """Return a whole number of at most a thousand digits. ``None`` for any other text."""
    text = text.strip()
    digits = text.isascii() and text.isdecimal() and len(text) <= MOST_DIGITS
    return int(text) if digits else None


def read_lines(stream: BinaryIO) -> Iterator[tuple[int, str]]:
    """Yield the lines of a stream with their numbers, from 1. One that is too long ends in `CUT`.

    Raises:
        ConfigurationError: The stream is not text.
    """
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
            text += f"{CUT}\n"
            while raw and not raw.endswith(b"\n"):
                raw = stream.readline(LONGEST_LINE)
        yield number, text


def _check_text(start: bytes) -> None:
    if start.startswith(_BINARY_STARTS) or b"\0" in start:
        raise ConfigurationError(
            "The input is not a text file. Pass plain text, CSV or JSON Lines in UTF-8, also "
            "compressed with gzip, or Parquet. Convert a spreadsheet, another archive or UTF-16 "
            "first."
        )


def explain_text(text: str) -> str | None:
    """Return why a line is invalid as text; ``None`` if it is valid."""
    if text.endswith(CUT):
        return f"The line is longer than {LONGEST_LINE // 2**20} MiB."
    return "The line is not UTF-8." if UNDECODED.search(text) else None


def make_encodable(text: str) -> str:
    """Return a text with question marks for what UTF-8 cannot encode."""
    return text if text.isascii() else text.encode(errors="replace").decode()


def list_names(names: list[str]) -> str:
    """Return names for a message, ten at most."""
    shown = ", ".join(repr(name) for name in names[:10])
    return f"{shown}, …" if len(names) > 10 else shown or "none"
