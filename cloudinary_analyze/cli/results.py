"""Where the records of a run go: a file that appears as a whole at the end, or a stream."""

from __future__ import annotations

import asyncio
import os
import sys
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Final, Protocol, Self

import attrs

from cloudinary_analyze.cli.console import CommandError, ExitCode

STANDARD: Final = "-"
PART: Final = ".part"


class ResultWriter(Protocol):
    """Takes the records of a run. Entered before anything is sent."""

    @property
    def place(self) -> str:
        """Where the results are, for people."""
        ...

    async def write(self, line: bytes) -> None:
        """Write a record, so that it survives the process.

        Raises:
            CommandError: It cannot be written.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...


def choose_writer(output: str) -> ResultWriter:
    """Return the writer for ``--output``.

    Raises:
        CommandError: The place cannot take a file.
    """
    if output == STANDARD:
        return StreamResults("standard output")
    path = Path(output)
    if path.is_dir():
        raise CommandError(f"The output {output} is a directory; --output takes a file.")
    if path.exists() and not path.is_file():  # a pipe or a device: nothing to rename
        return StreamResults(output, path)
    return FileResults(path)


def _refuse(place: object, error: OSError) -> CommandError:
    return CommandError(f"The output {place} cannot be written: {error.strerror}.")


@attrs.define(eq=False)
class FileResults:
    """Writes beside the file while the run lasts, and renames at its end, however it ends.

    Results were paid for, so a file of that name that was there before is kept under another.

    Attributes:
        path: The file.
    """

    path: Path
    _part: Path = attrs.field(init=False)
    _stream: BinaryIO | None = attrs.field(default=None, init=False)
    _empty: bool = attrs.field(default=True, init=False)
    _kept: Path | None = attrs.field(default=None, init=False)

    def __attrs_post_init__(self) -> None:
        self._part = self.path.with_name(self.path.name + PART)

    @property
    def place(self) -> str:
        """See `ResultWriter.place`."""
        if self._kept is None:
            return str(self.path)
        return f"{self.path} (the earlier file of that name is now {self._kept})"

    def __enter__(self) -> Self:
        try:
            self._stream = open(self._part, "xb", buffering=0)  # noqa: PTH123
        except FileExistsError:
            raise CommandError(
                f"{self._part} exists: another run is writing it, or one was killed and left its "
                "results there. Move it away, or name another --output."
            ) from None
        except OSError as error:
            raise _refuse(self._part, error) from None
        return self

    async def write(self, line: bytes) -> None:
        """See `ResultWriter.write`. The system takes a line for a file without a wait."""
        assert self._stream is not None
        self._empty = False
        try:
            _write_all(self._stream.fileno(), line)
        except OSError as error:
            raise _stop_for(self._part, error) from None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._stream is not None
        self._stream.close()
        if self._empty and error is not None:
            self._part.unlink()
            return
        if self.path.exists():
            self._kept = self._choose_free_name()
            self.path.rename(self._kept)
        self._part.replace(self.path)

    def _choose_free_name(self) -> Path:
        names = (self.path.with_name(f"{self.path.name}.{number}") for number in count(1))
        return next(name for name in names if not name.exists())


@attrs.define(eq=False)
class StreamResults:
    """Writes to standard output, a pipe or a device.

    Attributes:
        place: See `ResultWriter.place`.
        path: What to open; ``None``: standard output, which is open.
    """

    place: str
    path: Path | None = None
    _descriptor: int = attrs.field(default=-1, init=False)

    def __enter__(self) -> Self:
        if self.path is None:
            self._descriptor = sys.stdout.fileno()
            return self
        try:
            self._descriptor = os.open(self.path, os.O_WRONLY)
        except OSError as error:
            raise _refuse(self.path, error) from None
        return self

    async def write(self, line: bytes) -> None:
        """See `ResultWriter.write`. In a thread: a pipe makes its writer wait for its reader."""
        try:
            await asyncio.to_thread(_write_all, self._descriptor, line)
        except BrokenPipeError:
            raise CommandError(
                f"Whoever read {self.place} reads no more; nothing further was sent.",
                exit_code=ExitCode.STOPPED,
            ) from None
        except OSError as error:
            raise _stop_for(self.place, error) from None

    def __exit__(self, *_: object) -> None:
        if self.path is not None:
            os.close(self._descriptor)


def _stop_for(place: object, error: OSError) -> CommandError:
    return CommandError(
        f"Results could not be written to {place}: {error.strerror}. Nothing further was sent.",
        exit_code=ExitCode.STOPPED,
    )


def _write_all(descriptor: int, line: bytes) -> None:
    """Write past the buffers of Python, which would break again when the process ends."""
    rest = memoryview(line)
    while rest:
        rest = rest[os.write(descriptor, rest) :]
