"""The servers of benchmarks run in separate processes, so that only the clients are measured."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import attrs

ROOT: Final = Path(__file__).parent.parent
PATIENCE: Final = 20.0  # seconds for the end of a process


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
