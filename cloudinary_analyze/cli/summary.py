"""The end of a run: counts, closing tables, exit code and closing sentence.

The counts of the results are `Statistics`, which the report also shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

import attrs
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cloudinary_analyze._meter import SessionStats
from cloudinary_analyze.cli.screen import CommandError, ExitCode, build_table, say
from cloudinary_analyze.errors import (
    AnalyzeError,
    BudgetReachedError,
    BulkStoppedError,
    QuotaExceededError,
)
from cloudinary_analyze.responses import Limit
from cloudinary_analyze.results.statistics import Durations, Statistics, format_seconds

SHOWN_QUEUEING: Final = 0.1  # seconds


def print_summary(
    console: Console,
    statistics: Statistics,
    *,
    quota: Mapping[str, Limit],
    stats: SessionStats,
    skipped: int,
    queued: Durations,
    place: str,
) -> None:
    """Print the closing tables.

    Args:
        console: Where to print.
        statistics: The counts of the results.
        quota: The known quotas.
        stats: The session's counts.
        skipped: The number of items that had their outcome from an earlier run.
        queued: The time that items of this run queued before their first attempt.
        place: Where the results are. Empty if they could not be written.
    """
    console.print(_build_model_table(statistics))
    if statistics.causes:
        console.print(_build_cause_table(statistics))
    if quota:
        console.print(_build_quota_table(statistics, quota))
    median, late = queued.compute_quantile(0.5), queued.compute_quantile(0.95)
    if late is not None and late >= SHOWN_QUEUEING:
        say(
            console,
            f"Before their first attempt, items queued for {format_seconds(median)} (median), "
            f"{format_seconds(late)} (p95). The durations above do not include this.",
        )
    if stats.retries:
        say(console, f"{_count(stats.retries, 'attempt was', 'attempts were')} repeated.")
    if stats.ambiguous_retries:
        twice = _count(stats.ambiguous_retries, "attempt", "attempts")
        say(
            console,
            f"{twice} may have been charged twice: the response was lost, and the call repeated.",
            style="yellow",
        )
    if stats.ambiguous_failures:
        lost = _count(stats.ambiguous_failures, "call", "calls")
        say(
            console,
            f"{lost} may have been charged without a result.",
            style="yellow",
        )
    if skipped:
        say(console, f"{skipped:,} of these were done in an earlier run and skipped.")
    if place:
        say(console, f"Results: {place}")


def build_summary(
    statistics: Statistics | None,
    *,
    total: int | None,
    skipped: int,
    queued: Durations,
    stats: SessionStats,
    quota: Mapping[str, Limit],
) -> dict[str, Any]:
    """Return the counts of a run for JSON; see `print_summary`.

    Those of the results are ``None`` if ``statistics`` is: the results were not read to their end.
    """
    counts: dict[str, Any] = dict.fromkeys(
        ("answered", "failed", "left", "models", "causes", "units")
    )
    if statistics is not None:
        counts = {
            "answered": statistics.ok,
            "failed": statistics.failed,
            "left": None if total is None else max(0, total - statistics.total),
            "models": {
                name: {
                    "ok": model.ok,
                    "failed": model.failed,
                    "median_seconds": model.durations.compute_quantile(0.5),
                    "p95_seconds": model.durations.compute_quantile(0.95),
                }
                for name, model in statistics.models.items()
            },
            "causes": [
                {"cause": name, "items": cause.count, "example": cause.example}
                for name, cause in statistics.causes.items()
            ],
            "units": {name: quota.used for name, quota in statistics.quotas.items() if quota.used},
        }
    return {
        "items": total,
        **counts,
        "answered_before": skipped,
        "queued_median_seconds": queued.compute_quantile(0.5),
        "queued_p95_seconds": queued.compute_quantile(0.95),
        "quota": {name: limit.remaining for name, limit in quota.items()},
        "calls": stats.calls,
        "retries": stats.retries,
        "may_be_charged_twice": stats.ambiguous_retries,
        "failed_may_be_charged": stats.ambiguous_failures,
    }


def _build_model_table(statistics: Statistics) -> Table:
    table = build_table("model", numbers=("ok", "failed", "median", "p95"))
    for name, model in statistics.models.items():
        table.add_row(
            Text(name),
            f"{model.ok:,}",
            Text(f"{model.failed:,}", style="red" if model.failed else ""),
            format_seconds(model.durations.compute_quantile(0.5)),
            format_seconds(model.durations.compute_quantile(0.95)),
        )
    return table


def _build_cause_table(statistics: Statistics) -> Table:
    table = build_table("cause of failure", numbers=("items",))
    table.add_column("the first of them", overflow="fold")
    for name, cause in sorted(statistics.causes.items(), key=lambda entry: -entry[1].count):
        table.add_row(Text(name), f"{cause.count:,}", Text(cause.example))
    return table


def _build_quota_table(statistics: Statistics, quota: Mapping[str, Limit]) -> Table:
    table = build_table("quota", numbers=("used by this run", "left", "of"))
    for name, limit in quota.items():
        table.add_row(
            Text(name),
            f"{statistics.find_used(name):,}",
            _show_count(limit.remaining),
            _show_count(limit.limit),
        )
    return table


def _show_count(count: int | None) -> str:
    return "–" if count is None else f"{count:,}"


AGAIN: Final = "To resume, run the same command again; recorded items are skipped."


@attrs.frozen(kw_only=True)
class Position:
    """The position in the input at which a run without a ledger ended.

    Attributes:
        finished_through: The last line up to which every line has all of its results.
        exhausted: Whether the input was read to its end.
        cut: Whether an interrupt left items unsent, or with an error that a retry may solve.
    """

    finished_through: str | None
    exhausted: bool
    cut: bool = False


@attrs.frozen(kw_only=True)
class Balance:
    """The counts of a run in its ledger.

    Attributes:
        answered: Items with a response.
        failed: Items with an error.
        passing: How many of these failed for transient reasons.
        undelivered: How many failed because the result of their task was never delivered.
        invalid: How many are invalid lines of the input.
        total: The number of all items. ``None`` if unknown.
        lasting: Whether the same command resumes it. An emulator's run starts over.
    """

    answered: int
    failed: int
    passing: int
    undelivered: int
    invalid: int
    total: int | None
    lasting: bool = True

    @property
    def left(self) -> int | None:
        """The number of items without an outcome. ``None`` if unknown."""
        return None if self.total is None else max(0, self.total - self.answered - self.failed)


@attrs.frozen
class Ending:
    """The result of a run.

    Attributes:
        exit_code: What the process ends with.
        sentence: The closing sentence, or an empty text.
    """

    exit_code: ExitCode
    sentence: str = ""


def decide_ending(
    position: Position,
    *,
    failed: int,
    balance: Balance | str | None = None,
    failure: BaseException | None = None,
    stops: Mapping[str, Exception] | None = None,
    interrupted: bool = False,
    aborted: bool = False,
    as_tasks: bool = False,
) -> Ending:
    """Decide the exit code and the closing sentence of a run.

    Args:
        position: The position that it reached.
        failed: Items whose outcome is an error. With a ledger, those of earlier runs are included.
        balance: The counts of the ledger, if there is one, or the error of reading it.
        failure: The error that ended the stream, if any.
        stops: Features and models that were stopped, and why. ``""``: all of them.
        interrupted: Whether an interrupt asked it to finish.
        aborted: Whether a second interrupt cut off the calls in flight.
        as_tasks: Whether tasks were in flight, which continue remotely.
    """
    if balance is None:
        way_on = _build_way_on(position)
    else:
        way_on = balance if isinstance(balance, str) else _build_balance(balance)
    stops = stops or {}
    if failure is not None:
        code, reason = _explain(failure, stops)
        return Ending(code, f"{reason} {way_on}")
    if aborted:
        reason = "Aborted: calls in flight were cut off, and may have been charged."
        if as_tasks and balance is not None:
            reason = "Aborted: submitted tasks continue. Run the same command again to resume them."
        return Ending(ExitCode.INTERRUPTED, f"{reason} {way_on}")
    if stops:
        continued = "" if "" in stops else " The other models continued."
        return Ending(ExitCode.STOPPED, f"{_explain_stops(stops)}{continued} {way_on}")
    complete = position.exhausted or (isinstance(balance, Balance) and balance.left == 0)
    if interrupted and (position.cut or not complete):
        reason = "Interrupted: calls in flight were finished, and their results written."
        return Ending(ExitCode.INTERRUPTED, f"{reason} {way_on}")
    code = ExitCode.FAILURES if failed else ExitCode.DONE
    return Ending(code, _build_retry(balance) if isinstance(balance, Balance) else "")


def _explain(failure: BaseException, stops: Mapping[str, Exception]) -> tuple[ExitCode, str]:
    match failure:
        case CommandError():
            return failure.exit_code, str(failure)
        case BudgetReachedError(feature=feature):
            return ExitCode.STOPPED, _explain_stops({**stops, feature or "": failure})
        case BulkStoppedError(reason=AnalyzeError() as reason):
            return ExitCode.STOPPED, _explain_stops(stops or {"": reason})
        case AnalyzeError():
            return ExitCode.STOPPED, failure.message
        case OSError():
            return ExitCode.STOPPED, f"Reading the input failed: {failure.strerror}."
    raise failure


def _explain_stops(stops: Mapping[str, Exception]) -> str:
    """Return a sentence for each feature or model that stopped, or one for all of them."""
    sentences = []
    for name, reason in stops.items():
        if name and "" in stops:
            continue  # in the end, everything stopped
        if isinstance(reason, BudgetReachedError):
            sentences.append(f"Stopped: {reason}")
        elif name:
            sentences.append(f"Stopped sending {name}: {reason}")
        else:
            sentences.append(
                f"Stopped early, because every remaining item would fail with this error: {reason}"
            )
        if isinstance(reason, QuotaExceededError):
            sentences.append(_describe_reset(reason))
    return " ".join(sentences)


def _describe_reset(error: QuotaExceededError) -> str:
    if error.reset_time is None:
        return "The service did not report when the quota resets."
    instant = datetime.fromtimestamp(error.reset_time, UTC)
    return f"The quota resets at {instant:%Y-%m-%d %H:%M:%S} UTC."


def _build_balance(balance: Balance) -> str:
    """Return the sentences about what is done, what is left, and how to resume."""
    sentence = f"{_count(balance.answered, 'item is', 'items are')} answered"
    if balance.failed:
        sentence += f", {balance.failed:,} failed"
    left = balance.left
    sentence += ", the rest of the input is left" if left is None else f", {left:,} left"
    return f"{sentence}. {AGAIN}"


def _build_retry(balance: Balance) -> str:
    final = balance.failed - balance.passing - balance.undelivered - balance.invalid
    sentences = []
    if not balance.lasting:
        return ""
    if balance.passing:
        sentences.append(
            f"{_count(balance.passing, 'item', 'items')} failed for transient reasons; "
            "run the same command again to retry."
        )
    if balance.undelivered:
        sentences.append(
            f"{_count(balance.undelivered, 'result was', 'results were')} never delivered; "
            "--retry-failed requests them again as calls, which are charged."
        )
    if final > 0:
        sentences.append(
            f"{_count(final, 'item', 'items')} failed permanently; use --retry-failed to retry."
        )
    if balance.invalid:
        sentences.append(
            f"{_count(balance.invalid, 'input line is', 'input lines are')} invalid; "
            "correct the input and run the same command again."
        )
    return " ".join(sentences)


def _count(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def _build_way_on(position: Position) -> str:
    """Return the sentences about where a run without a ledger stopped and how to resume."""
    if position.exhausted and not position.cut:
        return "Every input line has its outcome."
    through = position.finished_through
    so_far = "No input line has all of its results"
    if through is not None:
        so_far = f"Every input line through {through} has its results"
    return (
        f"{so_far}; lines that were not reached were not sent. To resume, run again with the lines "
        "that follow, or pass --ledger the next time."
    )
