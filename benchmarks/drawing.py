"""Draws figures over time as SVG: small panels, two in a row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final
from xml.sax.saxutils import escape

import attrs

NAMESPACE: Final = "http://www.w3.org/2000/svg"
WIDTH: Final = 860
PANEL: Final = 150
GAP: Final = 52
LEFT: Final = 52
RIGHT: Final = 24
TOP: Final = 64
STYLE: Final = """
  svg { --ink: #1f2328; --quiet: #59636e; --grid: #d8dee4; --paper: #ffffff;
        --c0: #0969da; --c1: #bc4c00; --c2: #8250df; font: 12px system-ui, sans-serif; }
  @media (prefers-color-scheme: dark) {
    svg { --ink: #e6edf3; --quiet: #9198a1; --grid: #30363d; --paper: #0d1117;
          --c0: #58a6ff; --c1: #f0883e; --c2: #bc8cff; } }
  .paper { fill: var(--paper) } text { fill: var(--quiet) } .title { fill: var(--ink);
  font-weight: 600 } .grid { stroke: var(--grid) }
  .c0, .c1, .c2, .limit { fill: none; stroke-linejoin: round; stroke-width: 1.4 }
  .c0 { stroke: var(--c0); stroke-width: 2.2 } .c1 { stroke: var(--c1) }
  .c2 { stroke: var(--c2) } .limit { stroke: var(--quiet); stroke-dasharray: 4 3 }
"""


@attrs.frozen(kw_only=True)
class Line:
    """What was measured in each second.

    Attributes:
        values: One per second.
        name: The name in the legend, if the line is in it.
        kind: A class of the style. Default: a color by its place.
    """

    values: Sequence[float]
    name: str = ""
    kind: str = ""


@attrs.frozen(kw_only=True)
class Panel:
    """Lines of one unit."""

    title: str
    lines: Sequence[Line]


def draw(title: str, panels: Sequence[Panel]) -> str:
    """Return the SVG of small panels, two in a row."""
    height = TOP + (len(panels) + 1) // 2 * (PANEL + GAP)
    lines = [
        f'<svg xmlns="{NAMESPACE}" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">',
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{height}"/>',
        f'<text class="title" x="{LEFT}" y="24">{escape(title)}</text>',
    ]
    width = WIDTH / 2
    for number, panel in enumerate(panels):
        left, top = number % 2 * width + LEFT, TOP + number // 2 * (PANEL + GAP)
        lines += _draw_panel(panel, left, top, width - LEFT - RIGHT)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _draw_panel(panel: Panel, left: float, top: float, width: float) -> list[str]:
    seconds = max(1, *(len(line.values) - 1 for line in panel.lines))
    most = 1.1 * max(1, *(max(line.values, default=0) for line in panel.lines))
    down = PANEL / most
    lines = [f'<text class="title" x="{left}" y="{top - 8}">{escape(panel.title)}</text>']
    for value in range(0, int(most) + 1, _find_step(most)):
        y = top + PANEL - value * down
        lines.append(f'<path class="grid" d="M{left} {y:.1f}h{width}"/>')
        lines.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value}</text>')
    step = next(step for step in (5, 10, 30, 60, 120, 300, 900, 3600) if seconds / step <= 6)
    for second in range(0, seconds + 1, step):
        x = left + second * width / seconds
        label = f"{second} s" if step < 60 else f"{second // 60} min"
        lines.append(
            f'<text x="{x:.1f}" y="{top + PANEL + 15}" text-anchor="middle">{label}</text>'
        )
    x = left + width
    for number, line in reversed([*enumerate(panel.lines)]):
        points = " ".join(
            f"{left + second * width / seconds:.1f},{top + PANEL - value * down:.1f}"
            for second, value in enumerate(line.values)
        )
        kind = line.kind or f"c{number}"
        lines.append(f'<polyline class="{kind}" points="{points}"/>')
        if line.name:
            lines.append(f'<path class="{kind}" d="M{x - 26} {top - 12}h26"/>')
            lines.append(
                f'<text x="{x - 32}" y="{top - 8}" text-anchor="end">{escape(line.name)}</text>'
            )
            x -= 46 + 7 * len(line.name)
    return lines


def _find_step(most: float) -> int:
    return next(step for step in (5, 10, 20, 50, 100, 200, 500, 1000, 5000) if most / step <= 5)
