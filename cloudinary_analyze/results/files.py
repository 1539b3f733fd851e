"""Files of results: read records back, and write files atomically."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from cloudinary_analyze._wire import codec
from cloudinary_analyze.errors import ConfigurationError


def read_records(
    lines: Iterable[bytes | str], *, on_bad_line: Callable[[int], None] | None = None
) -> Iterator[dict[str, Any]]:
    """Read the records of ``results.jsonl``, lazily. Blank lines are skipped.

    Args:
        lines: The lines, for example of a file opened in binary mode.
        on_bad_line: Called with the number, from 1, of a line that is not a record, which is then
            skipped. A process that was killed leaves such a line at the end. Default: raise.

    Raises:
        ConfigurationError: A line is not a record.
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
                f"Line {number} of the results is not a record of a run: either the file is not the "
                "output of a run, or the line was cut short when one was killed. Remove the line, "
                "or name the right file."
            )


def _read_json(raw: bytes) -> Any:
    """Return the value of a line. ``None`` if it is not JSON."""
    try:
        return codec.loads(raw)
    except (ValueError, RecursionError):
        return None


@contextmanager
def open_replacement(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a file that replaces another once it is complete.

    If the block raises, the old file is unchanged. A symbolic link is followed, and a pipe or a
    device is written directly. The new file has the permissions of the old one. If there was none,
    only its owner can read it. An unfinished file of a killed process is replaced.

    Raises:
        OSError: It cannot be written, or another process is writing it.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        with target.open("wb") as stream:
            yield stream
        return
    part = target.with_name(f".{target.name}.cloudinary-analyze.part")
    with _open_part(part) as stream:
        try:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
            _copy_permissions(target, part)
            if os.name == "nt":  # Windows does not rename open files
                stream.close()
            part.replace(target)
        except BaseException:
            if os.name == "nt":
                stream.close()
            part.unlink(missing_ok=True)
            raise


def _open_part(part: Path) -> BinaryIO:
    """Open an unfinished file, which no other process is writing.

    Raises:
        OSError: Another process is writing it.
    """
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    while True:
        descriptor = os.open(part, flags, 0o600)
        stream = os.fdopen(descriptor, "wb")
        try:
            _lock(descriptor, part)
            if part.exists() and os.path.samestat(os.fstat(descriptor), part.stat()):
                os.truncate(descriptor, 0)
                return stream
        except BaseException:
            stream.close()
            raise
        stream.close()  # another process finished it in the meantime


def _lock(descriptor: int, part: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(errno.EBUSY, "Another process is writing it", str(part)) from None


def _copy_permissions(target: Path, part: Path) -> None:
    mode = 0o600
    if target.exists():
        status = target.stat()
        mode = stat.S_IMODE(status.st_mode)
        if hasattr(os, "chown"):
            with suppress(OSError):
                os.chown(part, status.st_uid, status.st_gid)
    part.chmod(mode)
