"""Distributions over all results of a run, of any number of lines, in bounded memory.

Pure. Counts by name have a maximum number of names; further names are counted together. Durations
are kept in a logarithmic histogram, so their quantiles are accurate to about 1 %.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Final

import attrs

from cloudinary_analyze.results.findings import NOTHING, Findings, read_number

SCORE_COLUMNS: Final = 20
MOST_COLUMNS: Final = 40  # of the durations
TICK_WIDTH: Final = 0.16  # share of an axis that a text needs, so that texts do not overlap
BAD_LINES: Final = "bad input lines"
_OTHERS: Final = "(others)"
_MOST_MODELS: Final = 100
_MOST_QUESTIONS: Final = 50
_MOST_CAUSES: Final = 50
_MOST_LABELS: Final = 20_000
_EXAMPLES: Final = 3
_LONGEST_NAME: Final = 200  # characters
_STEPS: Final = 100  # of the durations' histogram to a factor of e
_SHORTEST, _LONGEST = 1e-3, 1e5  # seconds; beyond them the histogram does not distinguish values


def choose_name(name: str, taken: Mapping[str, Any], most: int) -> str:
    """Return the name to count under: the shortened name, or the common one for further names."""
    name = name[:_LONGEST_NAME]
    return name if name in taken or len(taken) < most else _OTHERS


@attrs.define(eq=False)
class Scores:
    """Scores from 0 to 1 in columns of equal width."""

    columns: list[int] = attrs.field(factory=lambda: [0] * SCORE_COLUMNS)

    def add(self, score: float) -> None:
        """Count a score."""
        column = int(min(max(score, 0.0), 1.0) * SCORE_COLUMNS)
        self.columns[min(column, SCORE_COLUMNS - 1)] += 1

    @property
    def count(self) -> int:
        """The number of values."""
        return sum(self.columns)


@attrs.define(eq=False)
class Durations:
    """Seconds, from a millisecond to a day, on a logarithmic scale.

    Attributes:
        steps: The number of durations in each step of the scale.
    """

    steps: Counter[int] = attrs.field(factory=Counter, init=False)

    def add(self, seconds: float) -> None:
        """Count a duration."""
        self.steps[_find_step(seconds)] += 1

    @property
    def count(self) -> int:
        """The number of values."""
        return self.steps.total()

    def compute_quantile(self, quantile: float) -> float | None:
        """Return the seconds that this share did not exceed. ``None`` without durations."""
        rank = max(1, math.ceil(quantile * self.count))
        for step, count in sorted(self.steps.items()):
            rank -= count
            if rank <= 0:
                return math.exp((step + 0.5) / _STEPS)
        return None

    @classmethod
    def merge(cls, parts: Iterable[Durations]) -> Durations:
        """Return the durations of several histograms as one."""
        merged = cls()
        for part in parts:
            merged.steps.update(part.steps)
        return merged

    def span(self) -> tuple[int, int]:
        """Return the first and the last step. There must be at least one."""
        return min(self.steps), max(self.steps)

    def spread(self, axis: Axis) -> list[int]:
        """Return the counts in the columns of an axis."""
        columns = [0] * axis.columns
        for step, count in self.steps.items():
            columns[int((step - axis.first) / (axis.last + 1 - axis.first) * axis.columns)] += count
        return columns


def _find_step(seconds: float) -> int:
    return math.floor(_STEPS * math.log(min(max(seconds, _SHORTEST), _LONGEST)))


@attrs.frozen
class Axis:
    """A logarithmic axis of seconds that several histograms share.

    Attributes:
        first: Its first step.
        last: Its last step.
        columns: The number of columns to draw.
    """

    first: int
    last: int
    columns: int

    def place(self, seconds: float) -> float:
        """Return the position of a duration, 0 to 1."""
        where = (_STEPS * math.log(seconds) - self.first) / (self.last + 1 - self.first)
        return min(max(where, 0.0), 1.0)

    def ticks(self) -> list[tuple[float, str]]:
        """Return positions and texts for round durations."""
        low, high = math.exp(self.first / _STEPS), math.exp((self.last + 1) / _STEPS)
        for bases in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8)):
            rounds = [base * 10.0**power for power in range(-3, 6) for base in bases]
            inside = [seconds for seconds in rounds if low <= seconds <= high]
            if len(inside) >= 3:
                break
        else:
            inside = [low, high]
        ticks: list[tuple[float, str]] = []
        for seconds in inside:
            place = self.place(seconds)
            if not ticks or place - ticks[-1][0] >= TICK_WIDTH:
                ticks.append((place, format_seconds(seconds)))
        return ticks


def build_axis(durations: Iterable[Durations]) -> Axis | None:
    """Return the axis for all durations. ``None`` without durations."""
    spans = [each.span() for each in durations if each.count]
    if not spans:
        return None
    first, last = min(span[0] for span in spans), max(span[1] for span in spans)
    margin = max(0, _STEPS - (last - first)) // 2  # at least a factor of e is shown
    first, steps = first - margin, last - first + 1 + 2 * margin
    wide = -(-steps // MOST_COLUMNS)  # all columns have the same number of steps
    columns = -(-steps // wide)
    return Axis(first, first + wide * columns - 1, columns)


def format_seconds(seconds: float | None) -> str:
    """Return a duration as text, with two or three significant digits."""
    if seconds is None:
        return "–"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.01 else f"{seconds * 1000:.2g} ms"
    return f"{seconds:.3g} s" if seconds < 120 else f"{seconds / 60:,.0f} min"


@attrs.define(eq=False)
class ModelStatistics:
    """The outcomes of one model's items, and the distributions of its scores and durations."""

    ok: int = 0
    failed: int = 0
    scores: Scores = attrs.field(factory=Scores)
    durations: Durations = attrs.field(factory=Durations)


@attrs.define(eq=False)
class Cause:
    """Failures with the same cause.

    Attributes:
        message: The message of the first failure.
        count: The number of failures.
        ambiguous: How many of them may have been charged.
        models: The number of failures of each model.
        lines: The first input lines that failed, with their file if there are several.
    """

    message: str
    count: int = 0
    ambiguous: int = 0
    models: Counter[str] = attrs.field(factory=Counter)
    lines: list[int | str] = attrs.field(factory=list)

    @property
    def example(self) -> str:
        """The first failure, with its line if it has one."""
        return f"line {self.lines[0]}: {self.message}" if self.lines else self.message


@attrs.define(eq=False)
class QuotaUse:
    """The quota of one add-on, from the responses.

    Attributes:
        used: Units that the run used, without restored responses.
        remaining: The smallest remainder.
        limit: The limit of the period.
        reset_time: When it resets, as recorded.
    """

    used: int = 0
    remaining: int | None = None
    limit: int | None = None
    reset_time: str | None = None


@attrs.define(eq=False)
class Statistics:
    """The results of a run: for its summary and, with findings, for its report.

    Attributes:
        models: The counts by model name. `BAD_LINES` counts invalid input.
        labels: The number of results with each label.
        label_total: The sum over all labels of the results with the label.
        questions: Verdicts by rejection question.
        qualities: The number of images of each quality.
        causes: The failures by cause.
        quotas: The quotas by add-on.
    """

    models: dict[str, ModelStatistics] = attrs.field(factory=dict)
    labels: Counter[str] = attrs.field(factory=Counter)
    questions: dict[str, Counter[str]] = attrs.field(factory=dict)
    qualities: Counter[str] = attrs.field(factory=Counter)
    causes: dict[str, Cause] = attrs.field(factory=dict)
    quotas: dict[str, QuotaUse] = attrs.field(factory=dict)
    ok: int = 0
    failed: int = 0

    @property
    def total(self) -> int:
        """All results."""
        return self.ok + self.failed

    @property
    def bad_lines(self) -> int:
        """The invalid lines of the input, which count as failed."""
        counts = self.models.get(BAD_LINES)
        return 0 if counts is None else counts.failed

    @property
    def durations(self) -> Durations:
        """Those of all models."""
        return Durations.merge(model.durations for model in self.models.values())

    def find_used(self, feature: str) -> int:
        """Return the units of an add-on that the run used."""
        quota = self.quotas.get(feature)
        return 0 if quota is None else quota.used

    def add(self, record: Mapping[str, Any], findings: Findings = NOTHING) -> None:
        """Count a result.

        Args:
            record: Its record, with any content.
            findings: The findings of its analysis.
        """
        name = choose_name(name_model(record), self.models, _MOST_MODELS)
        model = self.models.setdefault(name, ModelStatistics())
        if record["status"] == "ok":
            self.ok += 1
            model.ok += 1
            seconds = read_number(record.get("seconds"))
            if seconds is not None:
                model.durations.add(seconds)
            if findings is not NOTHING:
                self._add_findings(model, findings)
        else:
            self.failed += 1
            model.failed += 1
            self._add_failure(record, name)
        limits = record.get("limits")
        charged = record["status"] == "ok" and record.get("restored") is not True
        for limit in limits if isinstance(limits, list) else ():
            self._add_limit(limit, charged=charged)

    def _add_findings(self, model: ModelStatistics, findings: Findings) -> None:
        for label in findings.labels:
            self.labels[choose_name(label, self.labels, _MOST_LABELS)] += 1
        for mark in findings.marks:
            if mark.score is not None:
                model.scores.add(mark.score)
        for answer in findings.answers:
            if answer.question is not None and answer.verdict is not None:
                question = choose_name(answer.question, self.questions, _MOST_QUESTIONS)
                self.questions.setdefault(question, Counter())[answer.verdict] += 1
        if findings.quality is not None:
            level = choose_name(findings.quality.level, self.qualities, 20)
            self.qualities[level] += 1
            if findings.quality.score is not None:
                model.scores.add(findings.quality.score)

    def _add_failure(self, record: Mapping[str, Any], model: str) -> None:
        error = get_error(record)
        message = str(error.get("message") or "No reason was recorded.")
        name = choose_name(name_cause(record), self.causes, _MOST_CAUSES)
        cause = self.causes.setdefault(name, Cause(message[:1000]))
        cause.count += 1
        cause.ambiguous += error.get("ambiguous") is True
        cause.models[model] += 1
        line, file = record.get("line"), record.get("file")
        if isinstance(line, int) and isinstance(file, str):
            line = f"{line} of {file}"
        if isinstance(line, int | str) and len(cause.lines) < _EXAMPLES and line not in cause.lines:
            cause.lines.append(line)

    def _add_limit(self, limit: Any, *, charged: bool) -> None:
        if not isinstance(limit, dict):
            return
        name = choose_name(str(limit.get("type")), self.quotas, _MOST_MODELS)
        quota = self.quotas.setdefault(name, QuotaUse())
        used, remaining = limit.get("used_by_request"), limit.get("remaining")
        if charged and isinstance(used, int):
            quota.used += used
        if isinstance(remaining, int) and (quota.remaining is None or remaining < quota.remaining):
            quota.remaining = remaining
            total, reset = limit.get("limit"), limit.get("reset_time")
            quota.limit = total if isinstance(total, int) else None
            quota.reset_time = reset if isinstance(reset, str) else None


def name_model(record: Mapping[str, Any]) -> str:
    """Return the model of a record, or a placeholder if no model saw the line."""
    return str(record.get("model") or BAD_LINES)


def name_cause(record: Mapping[str, Any]) -> str:
    """Return the text that failures with the same cause share, without the source."""
    if record.get("model") is None:
        return "bad input line"
    error = get_error(record)
    parts = (error.get("type") or "unknown error", error.get("status"), error.get("code"))
    return " ".join(str(part) for part in parts if part)


def get_error(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the error of a record. Empty if there is none."""
    error = record.get("error")
    return error if isinstance(error, dict) else {}
