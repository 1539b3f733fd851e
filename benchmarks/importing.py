"""The cell of import time, each import in a fresh interpreter that holds nothing else.

Of ours the names that every program needs are imported, not the bare package, so that imports put
off until a name is used still count. What is put off until there is a session, aiohttp itself and
cattrs, counts in ``import-and-open``, which has a separate limit: nothing hides between the two.
Bytecode is compiled in advance, as pip does.
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
    """Give a directory for bytecode, as the environment may forbid to write it beside the source."""
    with tempfile.TemporaryDirectory() as directory:
        yield Place(directory=directory)


def _measure(statement: str, job: Job) -> Samples:
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": job.directory}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    command = [sys.executable, "-c", PROGRAM.format(statement=statement)]

    def run() -> float:
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
        return float(done.stdout)

    run()  # compiles what is not compiled yet
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
