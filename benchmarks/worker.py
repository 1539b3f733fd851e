"""The process of one contender. For each line on stdin, it measures and prints a sample."""

from __future__ import annotations

import json
import sys
from contextlib import closing

import attrs

from benchmarks.cells import CELLS
from benchmarks.model import Job


def main() -> None:
    """Measure the cell and contender named by the arguments, as often as asked."""
    cell, contender, job = sys.argv[1:]
    measure = CELLS[cell].contenders[contender]
    with closing(measure(Job(**json.loads(job)))) as samples:
        for _ in sys.stdin:
            print(json.dumps(attrs.asdict(next(samples))), flush=True)


if __name__ == "__main__":
    main()
