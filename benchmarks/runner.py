"""Runs cells: contenders take turns, round by round, each time in fresh processes."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Final

import attrs

from benchmarks.model import Cell, Job, Place, Sample, Target
from benchmarks.processes import ROOT

END_SECONDS: Final = 30.0


@attrs.frozen(kw_only=True)
class Effort:
    """How much to measure.

    Attributes:
        rounds: Samples of each contender, each of a fresh process.
        slices: Turns that a sample is divided into, in cells that are sliced.
        seconds: Per slice, for cells measured by time.
        items: Per slice, for cells measured by count.
        rivals: Whether all contenders run, or the subject and the baseline alone.
    """

    rounds: int
    slices: int
    seconds: float
    items: int
    rivals: bool


class WorkerEndedError(RuntimeError):
    """A worker ended without a sample. Its stderr has the reason."""


@attrs.define(slots=False)
class Result:
    """The results of a cell.

    Attributes:
        cell: What was measured.
        samples: Contender to its samples, one a round.
        broken: The rivals that failed, and so have no samples.
    """

    cell: Cell
    samples: Mapping[str, Sequence[Sample]]
    broken: Sequence[str] = ()

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

    def list_ratios(self, contender: str) -> list[float]:
        """Return each round's ratio of a contender to the baseline."""
        pairs = zip(self.samples[contender], self.samples[self.cell.baseline], strict=True)
        return [sample.value / base.value for sample, base in pairs]

    def compute_ratio(self, contender: str) -> float:
        """Return the median of the rounds' ratios, because a slow round slows both contenders."""
        return statistics.median(self.list_ratios(contender))

    def find_note(self, contender: str, note: str) -> float | None:
        """Return the median of a note, if the contender makes it."""
        values = [sample.notes[note] for sample in self.samples[contender] if note in sample.notes]
        return statistics.median(values) if values else None

    def compute_figure(self, target: Target) -> float:
        """Return the figure of the subject that a target limits."""
        subject = self.cell.subject
        if target.figure == "ratio":
            return self.compute_ratio(subject)
        if target.figure == "excess":
            return self.medians[subject] - self.medians[self.cell.baseline]
        if target.figure == "value":
            return self.medians[subject]
        noted = self.find_note(subject, target.note)
        assert noted is not None, f"{self.cell.name} makes no note {target.note!r}"
        return noted


def run_cell(cell: Cell, effort: Effort) -> Result:
    """Run one cell. A rival that fails is left out and does not end the run.

    Raises:
        WorkerEndedError: The subject or the baseline failed.
    """
    samples: dict[str, list[Sample]] = {
        contender: []
        for contender in cell.contenders
        if effort.rivals or contender in {cell.subject, cell.baseline}
    }
    broken = []
    with contextlib.ExitStack() as stack:
        place = stack.enter_context(cell.prepare(effort.items)) if cell.prepare else Place()
        for _ in range(min(effort.rounds, cell.most_rounds or effort.rounds)):
            taken = _run_round(cell, list(samples), place, effort)
            for contender in list(samples):
                if contender in taken:
                    samples[contender].append(taken[contender])
                else:
                    del samples[contender]
                    broken.append(contender)
    return Result(cell, samples, broken)


def _run_round(
    cell: Cell, contenders: Sequence[str], place: Place, effort: Effort
) -> dict[str, Sample]:
    slices: dict[str, list[Sample]] = {contender: [] for contender in contenders}
    with contextlib.ExitStack() as stack:
        workers = {
            contender: stack.enter_context(_run_worker(cell, contender, place, effort))
            for contender in contenders
        }
        for number in range(effort.slices if cell.sliced else 1):
            # the order alternates, so that no contender always follows the same one
            for contender in list(workers) if number % 2 == 0 else reversed(list(workers)):
                try:
                    slices[contender].append(_measure(workers[contender]))
                except WorkerEndedError:
                    if contender in {cell.subject, cell.baseline}:
                        raise
                    del workers[contender], slices[contender]
    return {contender: _combine(taken) for contender, taken in slices.items()}


@contextlib.contextmanager
def _run_worker(
    cell: Cell, contender: str, place: Place, effort: Effort
) -> Iterator[subprocess.Popen[str]]:
    # no user's credentials, and no debug mode of asyncio, which is slow
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("CLOUDINARY_")
        and name not in {"PYTHONASYNCIODEBUG", "PYTHONDEVMODE"}
    }
    job = Job(
        **attrs.asdict(place),
        seconds=effort.seconds,
        items=effort.items,
    )
    arguments = [cell.name, contender, json.dumps(attrs.asdict(job))]
    with subprocess.Popen(
        [sys.executable, "-m", "benchmarks.worker", *arguments],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        try:
            yield process
        finally:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait(END_SECONDS)


def _measure(worker: subprocess.Popen[str]) -> Sample:
    assert worker.stdin is not None
    assert worker.stdout is not None
    with contextlib.suppress(BrokenPipeError):  # the worker has ended, so no line follows
        worker.stdin.write("\n")
        worker.stdin.flush()
    line = worker.stdout.readline()
    if not line:
        raise WorkerEndedError("A worker ended without a sample; stderr says why.")
    return Sample(**json.loads(line))


def _combine(slices: Sequence[Sample]) -> Sample:
    return Sample(
        value=statistics.median(taken.value for taken in slices),
        notes={
            note: statistics.median(taken.notes[note] for taken in slices)
            for note in slices[0].notes
        },
    )
