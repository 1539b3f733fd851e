"""Draws figures over time as SVG: throttling scenarios with their contenders, or small panels."""

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
TOP: Final = 56
SMALL_TOP: Final = 64
STYLE: Final = """
  svg { --ink: #1f2328; --quiet: #59636e; --grid: #d8dee4; --paper: #ffffff;
        --c0: #0969da; --c1: #bc4c00; --c2: #8250df; font: 12px system-ui, sans-serif; }
  @media (prefers-color-scheme: dark) {
    svg { --ink: #e6edf3; --quiet: #9198a1; --grid: #30363d; --paper: #0d1117;
          --c0: #58a6ff; --c1: #f0883e; --c2: #bc8cff; } }
  .paper { fill: var(--paper) } text { fill: var(--quiet) } .title { fill: var(--ink);
  font-weight: 600 } .grid { stroke: var(--grid) } .limit { stroke: var(--ink); fill: none;
  stroke-dasharray: 4 3 } .c0, .c1, .c2 { fill: none; stroke-linejoin: round }
  .c0 { stroke: var(--c0); stroke-width: 2.2 } .c1 { stroke: var(--c1); stroke-width: 1.4 }
  .c2 { stroke: var(--c2); stroke-width: 1.4 } .bad { stroke-width: 1.2; stroke-dasharray: 1 3 }
"""


@attrs.frozen(kw_only=True)
class Curve:
    """The results of a contender in each second.

    Attributes:
        name: The contender.
        rates: Its accepted requests in each second.
        throttled: Its throttled requests in each second.
        failed: Items that ended with an error.
    """

    name: str
    rates: Sequence[float]
    throttled: Sequence[float]
    failed: int


@attrs.frozen(kw_only=True)
class Panel:
    """A scenario.

    Attributes:
        title: Its title.
        limit: What the service allows in each second.
        curves: The contenders, always in the same order.
    """

    title: str
    limit: Sequence[float]
    curves: Sequence[Curve]


@attrs.frozen(kw_only=True)
class Line:
    """What was measured in each second."""

    name: str
    values: Sequence[float]


@attrs.frozen(kw_only=True)
class Series:
    """A small panel: lines of one unit."""

    title: str
    lines: Sequence[Line]


def draw(panels: Sequence[Panel]) -> str:
    """Return the SVG."""
    height = TOP + len(panels) * (PANEL + GAP)
    names = list(dict.fromkeys(curve.name for panel in panels for curve in panel.curves))
    title = "Requests accepted per second while a service limits its clients, and throttled ones"
    lines = [
        f'<svg xmlns="{NAMESPACE}" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">',
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{height}"/>',
        *_draw_legend(names),
    ]
    for number, panel in enumerate(panels):
        lines += _draw_panel(panel, TOP + 24 + number * (PANEL + GAP), names)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _draw_legend(names: Sequence[str]) -> list[str]:
    entries = [("limit", "what the service allows"), *((f"c{n}", x) for n, x in enumerate(names))]
    lines, x = [], LEFT
    for kind, name in entries:
        lines.append(f'<path class="{kind}" d="M{x} 22h26"/>')
        lines.append(f'<text x="{x + 32}" y="26">{escape(name)}</text>')
        x += 62 + 7 * len(name)
    lines.append(f'<path class="c0 bad" d="M{x} 22h26"/>')
    lines.append(f'<text x="{x + 32}" y="26">throttled</text>')
    return lines


def _draw_panel(panel: Panel, top: float, names: Sequence[str]) -> list[str]:
    seconds = len(panel.limit)
    most = 1.25 * max(*panel.limit, 1)
    across, down = (WIDTH - LEFT - RIGHT) / seconds, PANEL / most

    def draw_line(rates: Sequence[float], kind: str, shift: float) -> str:
        points = " ".join(
            f"{LEFT + (second + shift) * across:.1f},{top + PANEL - min(rate, most) * down:.1f}"
            for second, rate in enumerate(rates)
        )
        return f'<polyline class="{kind}" points="{points}"/>'

    lines = [f'<text class="title" x="{LEFT}" y="{top - 8}">{escape(panel.title)}</text>']
    failed = ", ".join(f"{curve.name} {curve.failed:,}" for curve in panel.curves)
    lines.append(
        f'<text x="{WIDTH - RIGHT}" y="{top - 8}" text-anchor="end">'
        f"items failed: {escape(failed)}</text>"
    )
    step = _find_step(most)
    for rate in range(0, int(most) + 1, step):
        y = top + PANEL - rate * down
        lines.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        lines.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{rate}/s</text>')
    for second in range(0, seconds + 1, 10):
        x = LEFT + second * across
        lines.append(
            f'<text x="{x:.1f}" y="{top + PANEL + 15}" text-anchor="middle">{second} s</text>'
        )
    stairs = [(second, rate) for second, rate in enumerate(panel.limit)]
    path = "".join(
        f"{'L' if second else 'M'}{LEFT + second * across:.1f} {top + PANEL - rate * down:.1f}"
        f"h{across:.1f}"
        for second, rate in stairs
    )
    lines.append(f'<path class="limit" d="{path}"/>')
    # ours is drawn last, above the others
    for curve in reversed(panel.curves):
        kind = f"c{names.index(curve.name)}"
        lines.append(draw_line(curve.throttled, f"{kind} bad", 0.5))
        lines.append(draw_line(curve.rates, kind, 0.5))
    return lines


def _find_step(most: float) -> int:
    return next(step for step in (5, 10, 20, 50, 100, 200, 500, 1000, 5000) if most / step <= 5)


def draw_series(title: str, series: Sequence[Series]) -> str:
    """Return the SVG of small panels, two in a row."""
    height = SMALL_TOP + (len(series) + 1) // 2 * (PANEL + GAP)
    lines = [
        f'<svg xmlns="{NAMESPACE}" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">',
        f"<style>{STYLE}</style>",
        f'<rect class="paper" width="{WIDTH}" height="{height}"/>',
        f'<text class="title" x="{LEFT}" y="24">{escape(title)}</text>',
    ]
    width = WIDTH / 2
    for number, panel in enumerate(series):
        left, top = number % 2 * width + LEFT, SMALL_TOP + number // 2 * (PANEL + GAP)
        lines += _draw_series(panel, left, top, width - LEFT - RIGHT)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _draw_series(panel: Series, left: float, top: float, width: float) -> list[str]:
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
        lines.append(f'<polyline class="c{number}" points="{points}"/>')
        if len(panel.lines) > 1:
            lines.append(f'<path class="c{number}" d="M{x - 26} {top - 12}h26"/>')
            lines.append(
                f'<text x="{x - 32}" y="{top - 8}" text-anchor="end">{escape(line.name)}</text>'
            )
            x -= 46 + 7 * len(line.name)
    return lines
