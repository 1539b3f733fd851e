"""The registry: every cell there is, in the order of the table.

A new family of cells is a module with a ``CELLS`` tuple, added here.
"""

from __future__ import annotations

from typing import Final

from benchmarks import calling, decoding, importing, mapping
from benchmarks.model import Cell

CELLS: Final[dict[str, Cell]] = {
    cell.name: cell for family in (calling, decoding, importing, mapping) for cell in family.CELLS
}
