"""The words of the suite: cells, contenders, samples, targets. Values only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Literal

import attrs

OURS: Final = "ours"


@attrs.frozen(kw_only=True)
class Job:
    """What one fresh process is to do.

    Attributes:
        url: Origin of the benchmark server; empty for a cell that needs none.
        seconds: How long to measure, for cells that are measured by time.
        items: How many items to work on, for cells that are measured by count.
    """

    url: str
    seconds: float
    items: int


@attrs.frozen(kw_only=True)
class Sample:
    """What one fresh process measured.

    Attributes:
        value: The figure that is compared, in the cell's unit.
        notes: Other figures, by a name with its unit: ``"wall µs a call"``.
    """

    value: float
    notes: Mapping[str, float] = attrs.field(factory=dict)


Measure = Callable[[Job], Sample]


@attrs.frozen(kw_only=True)
class Target:
    """A limit on a figure of ours.

    Attributes:
        figure: ``"ratio"``: our median over the baseline's. ``"excess"``: ours minus the
            baseline's, in the cell's unit. ``"note"``: the median of the note `note`.
        most: The limit; more fails the check.
        note: The note's name.
    """

    figure: Literal["ratio", "excess", "note"]
    most: float
    note: str = ""


@attrs.frozen(kw_only=True)
class Cell:
    """One line of the table: contenders that do the same work.

    Attributes:
        name: What it is selected by.
        unit: Of the compared value: ``"µs CPU a call"``.
        contenders: Name to measure, in the order they take turns; `OURS` is one of them.
        baseline: The contender that ratios are taken against.
        targets: The limits that ``--check`` holds us to.
        quick: Whether ``--quick`` runs it.
        server: Whether it needs the benchmark server.
        delay: How long that server waits before it answers, in seconds.
    """

    name: str
    unit: str
    contenders: Mapping[str, Measure]
    baseline: str
    targets: tuple[Target, ...] = ()
    quick: bool = False
    server: bool = False
    delay: float = 0.0
