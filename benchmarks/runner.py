"""Runs cells: contenders take turns, round by round, each time in a fresh process."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cached_property

import attrs

from benchmarks.model import OURS, Cell, Job, Sample, Target
from benchmarks.server import ROOT, run_server


@attrs.frozen(kw_only=True)
class Effort:
    """How much to measure.

    Attributes:
        rounds: Samples of each contender.
        seconds: Per sample, for cells measured by time.
        items: Per sample, for cells measured by count.
        rivals: Whether all contenders run, or ours and the baseline alone.
    """

    rounds: int
    seconds: float
    items: int
    rivals: bool


@attrs.define(slots=False)
class Result:
    """What a cell's samples say. Ratios and limits are of medians."""

    cell: Cell
    samples: Mapping[str, Sequence[Sample]]

    @cached_property
    def medians(self) -> dict[str, float]:
        """Contender to its median, in the cell's unit."""
        return {
            contender: statistics.median(sample.value for sample in samples)
            for contender, samples in self.samples.items()
        }

    def find_range(self, contender: str) -> tuple[float, float]:
        """Return the least and the greatest value of a contender."""
        values = [sample.value for sample in self.samples[contender]]
        return min(values), max(values)

    def compute_ratio(self, contender: str) -> float:
        """Return a contender's median over the baseline's."""
        return self.medians[contender] / self.medians[self.cell.baseline]

    def find_ratio_range(self, contender: str) -> tuple[float, float]:
        """Return the least and the greatest ratio among the rounds."""
        pairs = zip(self.samples[contender], self.samples[self.cell.baseline], strict=True)
        ratios = [sample.value / base.value for sample, base in pairs]
        return min(ratios), max(ratios)

    def find_note(self, contender: str, note: str) -> float | None:
        """Return the median of a note, if the contender makes it."""
        values = [sample.notes[note] for sample in self.samples[contender] if note in sample.notes]
        return statistics.median(values) if values else None

    def compute_figure(self, target: Target) -> float:
        """Return the figure of ours that a target limits."""
        if target.figure == "ratio":
            return self.compute_ratio(OURS)
        if target.figure == "excess":
            return self.medians[OURS] - self.medians[self.cell.baseline]
        noted = self.find_note(OURS, target.note)
        assert noted is not None, f"{self.cell.name} makes no note {target.note!r}"
        return noted


def run_cell(cell: Cell, effort: Effort) -> Result:
    """Run one cell."""
    contenders = [
        contender
        for contender in cell.contenders
        if effort.rivals or contender in {OURS, cell.baseline}
    ]
    samples: dict[str, list[Sample]] = {contender: [] for contender in contenders}
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(run_server(delay=cell.delay)) if cell.server else ""
        job = Job(url=url, seconds=effort.seconds, items=effort.items)
        for _ in range(effort.rounds):
            for contender in contenders:
                samples[contender].append(_run_worker(cell, contender, job))
    return Result(cell, samples)


def _run_worker(cell: Cell, contender: str, job: Job) -> Sample:
    # credentials of the machine's user have no business here, nor has asyncio's debug mode
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("CLOUDINARY_")
        and name not in {"PYTHONASYNCIODEBUG", "PYTHONDEVMODE"}
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.worker",
            cell.name,
            contender,
            json.dumps(attrs.asdict(job)),
        ],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return Sample(**json.loads(done.stdout.splitlines()[-1]))
