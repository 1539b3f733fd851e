"""Check the files of a command, so that none of them overwrites another or the user's data."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Iterable
from itertools import count
from pathlib import Path
from typing import Final, TextIO

from cloudinary_analyze.cli.screen import STANDARD, CommandError
from cloudinary_analyze.ledger.file import COMPANIONS, find_companion

DATABASE: Final = b"SQLite format 3\0"


def is_stream(name: str) -> bool:
    """Whether records are streamed to a file: standard output, a pipe, a device."""
    path = Path(name)
    return name == STANDARD or (path.exists() and not path.is_file() and not path.is_dir())


def check_output(option: str, name: str) -> None:
    """Check in advance that a file can be written, and is not a ledger.

    Raises:
        CommandError: It cannot, or it is one.
    """
    if name == STANDARD:
        if sys.stdout is None or sys.stdout.closed:
            raise CommandError(f"{option} - writes to standard output, which is closed.")
        return
    path = Path(name)
    if is_database(path):
        raise _refuse(option, name, "it is a database, such as a ledger, and would be lost")
    _check_place(option, name)


def check_ledger(path: Path) -> None:
    """Check in advance that a path can be that of a ledger.

    Raises:
        CommandError: It cannot.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise _refuse("--ledger", str(path), "it is not a regular file")
    _check_place("--ledger", str(path))


def is_database(path: Path) -> bool:
    """Whether a file is a SQLite database."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as stream:
            return stream.read(len(DATABASE)) == DATABASE
    except OSError:
        return False


def _check_place(option: str, name: str) -> None:
    path = Path(os.path.realpath(name))
    if path.is_dir():
        raise _refuse(option, name, "it is a directory")
    if not path.parent.is_dir():
        raise _refuse(option, name, f"there is no directory {path.parent}")
    if path.exists() and not os.access(path, os.W_OK):
        raise _refuse(option, name, "it is not writable")
    if (not path.exists() or path.is_file()) and not os.access(path.parent, os.W_OK):
        raise _refuse(option, name, f"the directory {path.parent} is not writable")


def _refuse(option: str, name: str, reason: str) -> CommandError:
    return CommandError(f"{option} {name} cannot be written: {reason}. Nothing was sent.")


def check_conflicts(
    inputs: Iterable[tuple[str, str | Path]],
    outputs: Iterable[tuple[str, str | Path]],
    *,
    ledger: Path | None = None,
) -> None:
    """Check in advance that no output is an input or another output, whatever their names.

    Args:
        inputs: The description of each file that is read, and its path.
        outputs: The description of each file that is written, and its path.
        ledger: The ledger that is written, which has further files next to it.

    Raises:
        CommandError: Two of them are one file.
    """
    known: dict[object, str] = {}
    for what, path in inputs:
        known.setdefault(_identify(path, sys.stdin), what)
    written = list(outputs)
    if ledger is not None:
        written.append(("--ledger", ledger))
        written += [
            (f"the ledger's {ledger.name}{suffix}", find_companion(ledger, suffix))
            for suffix in COMPANIONS
        ]
    known.pop(None, None)
    for what, path in written:
        identity = _identify(path, sys.stdout)
        if identity in known:
            raise CommandError(
                f"{known[identity]} and {what} are the same file, {path}, which would be "
                "overwritten. Nothing was sent. Choose another name."
            )
        if identity is not None:
            known[identity] = what


def _identify(path: str | Path, standard: TextIO | None) -> object:
    """Return the identity of a file, equal for all its names. ``None`` for a device or a pipe."""
    try:
        if path != STANDARD:
            status = Path(path).stat()
        elif standard is None:
            return None
        else:
            status = os.fstat(standard.fileno())
    except (OSError, ValueError):
        return None if path == STANDARD else os.path.realpath(path)
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None


def set_aside(output: str) -> Path | None:
    """Rename an earlier file of results that this run would otherwise replace.

    Returns:
        Its new path. ``None`` if the file does not exist or is empty.

    Raises:
        CommandError: It cannot be renamed.
    """
    path = Path(os.path.realpath(output))  # a symbolic link stays
    if not path.is_file() or not path.stat().st_size:
        return None
    names = (path.with_name(f"{path.name}.{number}") for number in count(1))
    kept = next(name for name in names if not os.path.lexists(name))
    try:
        path.rename(kept)
    except OSError as error:
        raise CommandError(
            f"{path} holds other results and cannot be renamed to {kept.name}: {error.strerror}. "
            "Nothing was sent."
        ) from None
    return kept
