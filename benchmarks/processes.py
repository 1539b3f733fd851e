"""The servers of benchmarks run in separate processes, so that only the clients are measured."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs

ROOT: Final = Path(__file__).parent.parent
PATIENCE: Final = 20.0  # seconds for the start or the end of a process


@attrs.define
class Printed:
    """The output of a server.

    Attributes:
        address: Its first line.
        rest: The other lines, once it has ended.
    """

    address: str
    rest: str = ""


@contextlib.contextmanager
def run_module(module: str, *arguments: str) -> Iterator[Printed]:
    """Run a module that prints its address and then serves until stdin ends."""
    with subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        printed = Printed(process.stdout.readline().strip())
        try:
            yield printed
        finally:
            process.stdin.close()
            printed.rest = process.stdout.read()
            process.wait(PATIENCE)


@contextlib.contextmanager
def run_listener(*command: str, **environment: str) -> Iterator[int]:
    """Run a server that takes ``--port``. Yield the port once it accepts connections."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    process = subprocess.Popen(
        [*command, "--port", str(port)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, **environment},
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} did not start.")
            time.sleep(0.01)
        yield port
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def run_redis(fsync: str) -> Iterator[str]:
    """Run a private Redis with this ``appendfsync``, and yield its URL."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["redis-server", "--bind", "127.0.0.1", "--save", "", "--dir", folder]
        command += ["--appendonly", "yes", "--appendfsync", fsync]
        with run_listener(*command) as port:
            yield f"redis://127.0.0.1:{port}/0"
