"""One sample, in the fresh process that the runner starts for it; the sample goes to stdout."""

from __future__ import annotations

import json
import sys

import attrs

from benchmarks.cells import CELLS
from benchmarks.model import Job


def main() -> None:
    """Measure the cell and contender named by the arguments."""
    cell, contender, job = sys.argv[1:]
    sample = CELLS[cell].contenders[contender](Job(**json.loads(job)))
    print(json.dumps(attrs.asdict(sample)))


if __name__ == "__main__":
    main()
