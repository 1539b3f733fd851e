"""The command line: ``python -m benchmarks``, from the root of the repository."""

from __future__ import annotations

import argparse
import fnmatch
import json
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from benchmarks import machines, soak, throttling
from benchmarks.cells import CELLS
from benchmarks.model import Cell
from benchmarks.processes import ROOT
from benchmarks.report import build_document, describe_target, find_caveats, format_result, is_kept
from benchmarks.runner import Effort, run_cell

RESULTS: Final = ROOT / "benchmarks" / "results"
LEAST_ROUNDS: Final = 5  # so that one busy moment does not move the median


def _read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        epilog="python -m benchmarks throttling --help: how much of a limit clients use; "
        "python -m benchmarks machines --help: process pools and engines with a shared ledger; "
        "python -m benchmarks soak --help: memory and descriptors over ten minutes of faults",
    )
    parser.add_argument(
        "cells", nargs="*", help="names or patterns such as 'captioning-*'; default: all"
    )
    parser.add_argument("--list", action="store_true", help="list the cells and stop")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="measure only this package and the baseline, in few slices; default: main cells",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="measure the cells with targets, without rivals; exit 1 if a target is missed",
    )
    parser.add_argument(
        "--rounds", type=int, default=0, help=f"samples per contender, from {LEAST_ROUNDS}"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="the file for the JSON")
    arguments = parser.parse_args()
    if arguments.rounds and arguments.rounds < LEAST_ROUNDS:
        parser.error(f"--rounds must be {LEAST_ROUNDS} or more.")
    for pattern in arguments.cells:
        if not fnmatch.filter(CELLS, pattern):
            parser.error(f"Unknown cell {pattern!r}; --list shows all.")
    return arguments


def _select(arguments: argparse.Namespace) -> list[Cell]:
    cells = list(CELLS.values())
    if arguments.cells:
        cells = [
            cell
            for cell in cells
            if any(fnmatch.fnmatch(cell.name, pattern) for pattern in arguments.cells)
        ]
    elif arguments.quick:
        cells = [cell for cell in cells if cell.quick]
    if arguments.check:
        cells = [cell for cell in cells if cell.targets]
    return cells


def _choose_effort(arguments: argparse.Namespace) -> Effort:
    return Effort(
        rounds=arguments.rounds or (7 if arguments.check and not arguments.quick else LEAST_ROUNDS),
        slices=3 if arguments.quick else 10,
        seconds=0.15,
        items=50_000 if arguments.quick else 1_000_000,
        rivals=not arguments.quick and not arguments.check,
    )


def main() -> int:
    """Run the chosen cells, or the throttling scenarios; return the exit code."""
    if sys.argv[1:2] == ["throttling"]:
        return throttling.main(sys.argv[2:])
    if sys.argv[1:2] == ["machines"]:
        return machines.main(sys.argv[2:])
    if sys.argv[1:2] == ["soak"]:
        return soak.main(sys.argv[2:])
    arguments = _read_arguments()
    if arguments.list:
        for cell in CELLS.values():
            print(
                f"{cell.name:<24}{cell.unit}{'  quick' if cell.quick else ''}{'  has targets' if cell.targets else ''}"
            )
        return 0
    effort = _choose_effort(arguments)
    path = arguments.json or RESULTS / f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    results = []
    for cell in _select(arguments):
        if cell.program and shutil.which(cell.program) is None:
            print(f"{cell.name}: skipped, because {cell.program} is not installed")
            continue
        results.append(run_cell(cell, effort))
        print(format_result(results[-1]), flush=True)
        # after each cell, so that an interrupted run keeps its results
        path.write_text(json.dumps(build_document(results, effort), indent=1) + "\n")
    for caveat in find_caveats(results):
        print(f"Note: {caveat}")
    missed = [
        f"{result.cell.name}: {describe_target(result, target)}"
        for result in results
        for target in result.cell.targets
        if not is_kept(result, target)
    ]
    if arguments.check:
        print("\n".join(["", *missed]) if missed else "\nAll targets were met.")
    return 1 if arguments.check and missed else 0


if __name__ == "__main__":
    sys.exit(main())
