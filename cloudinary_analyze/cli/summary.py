"""What a run came to: counts while it lasts, and the table at its end.

Memory stays flat: times are kept in a histogram, causes up to a number.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import attrs
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cloudinary_analyze.cli.screen import say
from cloudinary_analyze.events import SessionStats
from cloudinary_analyze.responses import Limit

BAD_LINES: Final = "(bad input lines)"
MOST_CAUSES: Final = 50
_STEPS: Final = 100  # of the histogram to a factor of e, so that a time is right to 1 %


@attrs.define(eq=False)
class Durations:
    """Times of calls, of which quantiles are wanted: a histogram with a logarithmic scale."""

    _counts: Counter[int] = attrs.field(factory=Counter, init=False)

    def add(self, seconds: float) -> None:
        """Count a time."""
        self._counts[round(_STEPS * math.log(max(seconds, 1e-6)))] += 1

    def compute_quantile(self, quantile: float) -> float | None:
        """Return the time that this share of the calls did not exceed; ``None`` without calls."""
        rank = math.ceil(quantile * self._counts.total())
        for step, count in sorted(self._counts.items()):
            rank -= count
            if rank <= 0:
                return math.exp(step / _STEPS)
        return None


@attrs.define(eq=False)
class ModelTally:
    """What became of one model's items."""

    ok: int = 0
    failed: int = 0
    durations: Durations = attrs.field(factory=Durations)


@attrs.define(eq=False)
class Cause:
    """Why items failed: how many, and the first of them for an example."""

    example: str
    count: int = 0


@attrs.define(eq=False)
class Tally:
    """The counts of a run.

    Attributes:
        models: By wire name, and `BAD_LINES`.
        causes: By what the failures have in common.
        used: Units used up by add-on feature.
    """

    models: dict[str, ModelTally] = attrs.field(factory=dict)
    causes: dict[str, Cause] = attrs.field(factory=dict)
    used: Counter[str] = attrs.field(factory=Counter)
    done: int = 0
    failed: int = 0

    def add(self, record: Mapping[str, Any]) -> None:
        """Count a record."""
        tally = self.models.setdefault(record["model"] or BAD_LINES, ModelTally())
        self.done += 1
        if record["status"] == "ok":
            tally.ok += 1
            if record["seconds"] is not None:
                tally.durations.add(record["seconds"])
            for limit in record["limits"]:
                self.used[limit["type"]] += limit["used_by_request"] or 0
        else:
            tally.failed += 1
            self.failed += 1
            self._add_cause(record)

    def _add_cause(self, record: Mapping[str, Any]) -> None:
        name = name_cause(record)
        cause = self.causes.get(name)
        if cause is None:
            if len(self.causes) >= MOST_CAUSES:
                name = "other causes"
            example = Cause(f"line {record['line']}: {record['error']['message']}")
            cause = self.causes.setdefault(name, example)
        cause.count += 1


def name_cause(record: Mapping[str, Any]) -> str:
    """Return what failures of the same cause have in common; never the source itself."""
    if record["model"] is None:
        return "bad input line"
    error = record["error"]
    return " ".join(map(str, filter(None, (error["type"], error["status"], error["code"]))))


def print_summary(
    console: Console,
    tally: Tally,
    *,
    quota: Mapping[str, Limit],
    stats: SessionStats,
    skipped: int,
    place: str,
) -> None:
    """Print the closing tables.

    Args:
        console: Where.
        tally: The counts of the results.
        quota: What is known of the quotas.
        stats: The session's counts.
        skipped: How many items had their outcome from an earlier run.
        place: Where the results are; empty if they could not be written.
    """
    console.print(_build_model_table(tally))
    if tally.causes:
        console.print(_build_cause_table(tally))
    if quota:
        console.print(_build_quota_table(tally, quota))
    if stats.retries:
        sentence = f"{stats.retries:,} attempts were repeated"
        if stats.ambiguous_retries:
            sentence += f"; {stats.ambiguous_retries:,} of them may have been charged before"
        say(console, f"{sentence}.")
    if skipped:
        say(console, f"{skipped:,} of these were done in an earlier run, and not asked again.")
    if place:
        say(console, f"Results: {place}")


def _build_model_table(tally: Tally) -> Table:
    table = Table("model")
    for heading in ("ok", "failed", "median s", "p95 s"):
        table.add_column(heading, justify="right")
    for name, model in tally.models.items():
        table.add_row(
            Text(name),
            f"{model.ok:,}",
            Text(f"{model.failed:,}", style="red" if model.failed else ""),
            _show_seconds(model.durations.compute_quantile(0.5)),
            _show_seconds(model.durations.compute_quantile(0.95)),
        )
    return table


def _build_cause_table(tally: Tally) -> Table:
    table = Table("cause of failure")
    table.add_column("items", justify="right")
    table.add_column("the first of them", overflow="fold")
    for name, cause in sorted(tally.causes.items(), key=lambda entry: -entry[1].count):
        table.add_row(Text(name), f"{cause.count:,}", Text(cause.example))
    return table


def _build_quota_table(tally: Tally, quota: Mapping[str, Limit]) -> Table:
    table = Table("quota")
    for heading in ("used by these", "left", "of"):
        table.add_column(heading, justify="right")
    for name, limit in quota.items():
        table.add_row(
            Text(name),
            f"{tally.used[name]:,}",
            _show_count(limit.remaining),
            _show_count(limit.limit),
        )
    return table


def _show_seconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds:.3g}"


def _show_count(count: int | None) -> str:
    return "–" if count is None else f"{count:,}"
