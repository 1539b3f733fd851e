"""The cell of import time, each import in an interpreter of its own that holds nothing else.

Of ours the names that every program needs are imported, not the bare package, so that imports put
off until a name is used still count.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from functools import partial
from typing import Final

from benchmarks.model import OURS, Cell, Job, Sample, Target

BASELINE: Final = "aiohttp"
REPEATS: Final = 3
PROGRAM: Final = """
import time
begun = time.process_time()
{statement}
print(time.process_time() - begun)
"""


def _measure(statement: str, job: Job) -> Sample:
    command = [sys.executable, "-c", PROGRAM.format(statement=statement)]
    seconds = [
        float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        for _ in range(REPEATS)
    ]
    return Sample(value=1e3 * statistics.median(seconds))


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
        targets=(Target(figure="ratio", most=1.2),),
        quick=True,
    ),
)
