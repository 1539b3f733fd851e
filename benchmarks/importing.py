"""The cell of import time. Each import runs in a fresh interpreter.

For this package, the names that every program needs are imported, so imports that are delayed until
a name is used count. Imports that are delayed until a session opens (aiohttp and cattrs) count in
``import-and-open``, which has a separate limit. Bytecode is compiled in advance, as pip does.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from typing import Final

from benchmarks.model import OURS, Cell, Job, Place, Sample, Samples, Target

BASELINE: Final = "aiohttp"
PROGRAM: Final = """
import time
begun = time.process_time()
{statement}
print(time.process_time() - begun)
"""


@contextlib.contextmanager
def _prepare(_items: int) -> Iterator[Place]:
    """Yield a directory for bytecode, because the source's directory may be read-only."""
    with tempfile.TemporaryDirectory() as directory:
        yield Place(directory=directory)


def _measure(statement: str, job: Job) -> Samples:
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": job.directory}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", PROGRAM.format(statement=statement)]

    def run() -> float:
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return float(done.stdout)

    run()  # compiles the missing bytecode
    while True:
        yield Sample(value=1e3 * run())


OPEN_OURS: Final = """
import asyncio
from cloudinary_analyze import AnalyzeSession, Captioning, Credentials
async def main():
    async with AnalyzeSession(Credentials("cloud", "key", "secret")):
        pass
asyncio.run(main())
"""
OPEN_AIOHTTP: Final = """
import asyncio, aiohttp
async def main():
    async with aiohttp.ClientSession():
        pass
asyncio.run(main())
"""

CELLS: Final = (
    Cell(
        name="import",
        unit="ms CPU",
        contenders={
            OURS: partial(_measure, "from cloudinary_analyze import AnalyzeSession, Captioning"),
            BASELINE: partial(_measure, "import aiohttp"),
            "httpx": partial(_measure, "import httpx"),
            "vendor's SDK": partial(_measure, "import cloudinary_analysis"),
        },
        baseline=BASELINE,
        targets=(Target(figure="ratio", most=0.6),),
        quick=True,
        sliced=True,
        prepare=_prepare,
    ),
    Cell(
        name="import-and-open",
        unit="ms CPU",
        contenders={OURS: partial(_measure, OPEN_OURS), BASELINE: partial(_measure, OPEN_AIOHTTP)},
        baseline=BASELINE,
        targets=(Target(figure="ratio", most=1.3),),
        sliced=True,
        prepare=_prepare,
    ),
)
