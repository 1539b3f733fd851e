"""The value classes of the suite: cells, contenders, samples, targets."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager
from typing import Final, Literal

import attrs

OURS: Final = "ours"


@attrs.frozen(kw_only=True)
class Place:
    """The environment of a cell's workers.

    Attributes:
        url: Origin of the benchmark server, if there is one.
        directory: The directory of the prepared files, if there are any.
    """

    url: str = ""
    directory: str = ""


@attrs.frozen(kw_only=True)
class Job:
    """The work of one fresh process.

    Attributes:
        url: As in `Place`.
        directory: As in `Place`.
        seconds: How long to measure for one sample, for cells that are measured by time.
        items: How many items to work on, for cells that are measured by count.
    """

    url: str
    directory: str
    seconds: float
    items: int


@attrs.frozen(kw_only=True)
class Sample:
    """What was measured.

    Attributes:
        value: The figure that is compared, in the cell's unit.
        notes: Other figures, by a name with its unit: ``"wall µs a call"``.
    """

    value: float
    notes: Mapping[str, float] = attrs.field(factory=dict)


Samples = Generator[Sample, None, None]

Measure = Callable[[Job], Samples]
"""Prepares once, then measures only when the next sample is requested."""

Prepare = Callable[[int], AbstractContextManager[Place]]
"""Makes a cell's place ready, for that many items."""


@attrs.frozen(kw_only=True)
class Target:
    """A limit on a figure of the cell's subject.

    Attributes:
        figure: ``"ratio"``: to the baseline. ``"excess"``: its median minus the baseline's, in
            the cell's unit. ``"value"``: its median. ``"note"``: the median of the note `note`.
        most: The limit.
        noise: More than `most` and this together fails the check.
        note: The note's name.
    """

    figure: Literal["ratio", "excess", "value", "note"]
    most: float
    noise: float = 0.0
    note: str = ""


@attrs.frozen(kw_only=True)
class Cell:
    """One line of the table: contenders that do the same work.

    Attributes:
        name: The name that selects it on the command line.
        unit: Of the compared value: ``"µs CPU a call"``.
        contenders: The function that measures each contender, by name, in the order of their turns.
        baseline: The contender that ratios are taken against; the subject, where it is alone.
        subject: The contender that the targets are set for.
        targets: The limits that ``--check`` holds the subject to.
        quick: Whether ``--quick`` runs it.
        sliced: Whether the contenders of a round take turns slice by slice.
        most_rounds: The maximum number of rounds, for samples that take a minute and vary little.
            0: no limit.
        prepare: Prepares its place, if it needs one.
        program: A program that it requires. If it is missing, the cell is skipped.
    """

    name: str
    unit: str
    contenders: Mapping[str, Measure]
    baseline: str
    subject: str = OURS
    targets: tuple[Target, ...] = ()
    quick: bool = False
    sliced: bool = False
    most_rounds: int = 0
    prepare: Prepare | None = None
    program: str = ""
