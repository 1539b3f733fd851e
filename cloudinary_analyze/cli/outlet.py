"""Write to standard streams, pipes and devices without ever blocking the run.

A stream may be closed, full, limited in its encoding, or never read. A daemon thread writes,
because nothing can wake a thread that waits for a reader, and the process must still be able to
end.
"""

from __future__ import annotations

import asyncio
import io
import os
import queue
import select
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final, TextIO

from cloudinary_analyze._clock import wake

MOST_WAITING: Final = 1000  # pending writes; further messages are dropped while nothing reads
DRAIN_SECONDS: Final = 1.0

_Done = Callable[[OSError | None], object]


class Outlet:
    """Writes to a descriptor, in order, in a separate thread.

    After an error nothing more is written.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._queue: queue.SimpleQueue[tuple[bytes, _Done] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._failure: OSError | None = None

    def put(self, data: bytes) -> None:
        """Write soon. Never waits. Drops the data if too much is already pending."""
        if self._queue.qsize() < MOST_WAITING:
            self._start(data, lambda _: None)

    async def write(self, data: bytes) -> None:
        """Return once the data is written. Cancelling the wait does not cancel the write.

        Raises:
            OSError: It could not be written.
        """
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        failures: list[OSError] = []

        def finish(failure: OSError | None) -> None:
            if failure is not None:
                failures.append(failure)
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(wake, done)

        self._start(data, finish)
        await done
        if failures:
            raise failures[0]

    @property
    def failure(self) -> OSError | None:
        """The error that ended writing, if any."""
        return self._failure

    def close(self, seconds: float = DRAIN_SECONDS) -> None:
        """End once everything is written, but do not wait for a reader that does not read."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join(seconds)

    def _start(self, data: bytes, done: _Done) -> None:
        self._queue.put((data, done))
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="outlet", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        while (entry := self._queue.get()) is not None:
            data, done = entry
            if self._failure is None:
                try:
                    _write_all(self._descriptor, data)
                except OSError as error:
                    self._failure = error
            done(self._failure)


def _write_all(descriptor: int, data: bytes) -> None:
    """Write past the buffers of Python, which would fail again when the process ends."""
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(descriptor, rest) :]
        except BlockingIOError:  # another process made the stream non-blocking
            select.select([], [descriptor], [])


class MessageStream(io.TextIOBase):
    """A text stream for messages. Writing neither waits nor fails.

    Characters that its encoding lacks are escaped. Without an underlying stream, everything is
    dropped.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._encoding = getattr(stream, "encoding", None) or "utf-8"
        self._outlet: Outlet | None = None
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.flush()
                self._outlet = Outlet(stream.fileno())

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the underlying stream."""
        return self._encoding

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        with suppress(ValueError):
            return self._stream is not None and self._stream.isatty()
        return False

    def fileno(self) -> int:
        """Return the descriptor of the underlying stream.

        Raises:
            OSError: There is none.
        """
        if self._stream is None:
            raise io.UnsupportedOperation("fileno")
        return self._stream.fileno()

    def writable(self) -> bool:
        """Return true."""
        return True

    def write(self, text: str) -> int:
        """Write soon."""
        if self._outlet is not None:
            self._outlet.put(text.encode(self._encoding, "backslashreplace"))
        return len(text)

    def finish(self) -> None:
        """Wait until everything is written, but not for a reader that does not read."""
        if self._outlet is not None:
            self._outlet.close()


def protect_standard_streams() -> None:
    """Make standard streams safe: closed descriptors are not reused, limited encodings do not fail."""
    if os.name == "posix":
        for descriptor in (0, 1, 2):
            try:
                os.fstat(descriptor)
            except OSError:  # otherwise the next file that is opened, such as a ledger, gets it
                os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def flush_stdout() -> OSError | None:
    """Flush standard output. Return the error, if any. The interpreter does not try again."""
    if sys.stdout is None:
        return None
    try:
        sys.stdout.flush()
    except ValueError:  # it is closed
        return None
    except OSError as error:
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())
            os.close(null)
            sys.stdout.flush()
        return error
    return None


# characters that a terminal interprets, or that change the direction of text
_CONTROLS: Final = {
    code: f"\\u{code:04x}"  # which JSON reads, too
    for code in (
        *(code for code in range(0x20) if chr(code) not in "\t\n"),
        *range(0x7F, 0xA0),
        *(0x200E, 0x200F, 0x2028, 0x2029),
        *range(0x202A, 0x202F),
        *range(0x2066, 0x206A),
    )
}


def escape_controls(text: str) -> str:
    """Return a text without characters that a terminal interprets."""
    return text.translate(_CONTROLS)
