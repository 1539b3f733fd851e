"""Files of results: reading records back, and writing what is made of them all or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any, BinaryIO

from cloudinary_analyze._wire import codec
from cloudinary_analyze.errors import ConfigurationError


def read_records(
    lines: Iterable[bytes | str], *, on_bad_line: Callable[[int], None] | None = None
) -> Iterator[dict[str, Any]]:
    """Read the records of ``results.jsonl``, lazily. Blank lines are skipped.

    Args:
        lines: The lines, such as a file opened in binary mode.
        on_bad_line: Given the number, from 1, of a line that is no record, which is then passed
            over. A process that was killed leaves such a line at the end. Default: raise.

    Raises:
        ConfigurationError: A line is no record.
    """
    for number, line in enumerate(lines, start=1):
        raw = line.encode(errors="surrogatepass") if isinstance(line, str) else line
        if not raw.strip():
            continue
        record = _read_json(raw)
        if isinstance(record, dict) and record.get("status") in {"ok", "error"}:
            yield record
        elif on_bad_line is not None:
            on_bad_line(number)
        else:
            raise ConfigurationError(
                f"Line {number} of the results is no record of a run: either the file is not the "
                "output of a run, or the line was cut short when one was killed. Remove the line, "
                "or name the right file."
            )


def _read_json(raw: bytes) -> Any:
    """Return the value of a line, ``None`` for what is no JSON."""
    try:
        return codec.loads(raw)
    except (ValueError, RecursionError):
        return None


@contextmanager
def open_replacement(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file that takes the place of another once it is complete.

    Until then the old one stays; if the block raises it stays for good. A pipe or a device is
    written straight to.

    Raises:
        OSError: It cannot be written.
    """
    target = Path(path)
    if target.exists() and not target.is_file():
        with target.open("wb") as stream:
            yield stream
        return
    target = target.resolve()  # a symbolic link goes on pointing at the file
    part = target.with_name(f".{target.name}.{token_hex(4)}.part")
    try:
        with part.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(target)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
