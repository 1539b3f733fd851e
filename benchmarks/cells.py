"""The registry of all cells, in the order of the table.

A new family of cells is a module with a ``CELLS`` tuple, added here.
"""

from __future__ import annotations

from typing import Final

from benchmarks import (
    admitting,
    calling,
    commanding,
    decoding,
    delivering,
    importing,
    mapping,
    notifying,
    observing,
    pending,
    queueing,
    resuming,
    sharing,
)
from benchmarks.model import Cell

FAMILIES: Final = (
    calling,
    observing,
    decoding,
    importing,
    mapping,
    notifying,
    delivering,
    pending,
    queueing,
    resuming,
    commanding,
    sharing,
    admitting,
)
CELLS: Final[dict[str, Cell]] = {cell.name: cell for family in FAMILIES for cell in family.CELLS}
