"""The spending of a run: its limits, the dry run, and the estimate from a sample."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import closing, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import attrs
from cyclopts import Parameter, validators
from rich.console import Console
from rich.text import Text

from cloudinary_analyze._budget import Budget, Spent
from cloudinary_analyze.cli.feed import describe_bad_line
from cloudinary_analyze.cli.ledger import Book, RunLedger, build_makers, find_rescued
from cloudinary_analyze.cli.output import write_summary
from cloudinary_analyze.cli.screen import CommandError, ExitCode, MessageConsole, build_table, say
from cloudinary_analyze.cli.service import open_service
from cloudinary_analyze.cli.text import read_count
from cloudinary_analyze.errors import LedgerError
from cloudinary_analyze.ledger.items import Inventory, read_newest_responses
from cloudinary_analyze.outcomes import AnyOutcome
from cloudinary_analyze.requests import MODELS
from cloudinary_analyze.responses import Limit, find_limits
from cloudinary_analyze.results.records import InputItem

if TYPE_CHECKING:
    from cloudinary_analyze.cli.plan import RunPlan


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class SpendingOptions:
    """The spending limits of a run.

    Attributes:
        dry_run: Whether to only count what the run would send.
        sample: The number of rows to process, spread over the input. ``None``: all.
        max_calls: The maximum number of calls.
        max_units: ``FEATURE=N``: the maximum units of an add-on feature.
    """

    dry_run: Annotated[
        bool,
        Parameter(
            name="--dry-run",
            help="Print what the run would send and the quota left, and send nothing.",
        ),
    ] = False
    sample: Annotated[
        int | None,
        Parameter(
            name="--sample",
            help="Process N rows spread over the input, then estimate what the rest will cost.",
            validator=validators.Number(gte=1),
        ),
    ] = None
    max_calls: Annotated[
        int | None,
        Parameter(
            name="--max-calls",
            help="Stop after N charged calls. Recorded responses do not count.",
            validator=validators.Number(gte=0),
        ),
    ] = None
    max_units: Annotated[
        tuple[str, ...],
        Parameter(
            name="--max-units",
            help="FEATURE=N: stop a feature before it spends more than N units, such as "
            "ai_vision=50000; repeatable.",
            show_default=False,
        ),
    ] = ()

    def check(self, models: Iterable[str], *, streamed: bool) -> None:
        """Check that the options fit together.

        Raises:
            CommandError: They do not fit together.
        """
        self.build_budget(models)
        if self.sample is not None and self.dry_run:
            raise CommandError("--dry-run sends nothing, so it takes no --sample.")
        if self.sample is not None and streamed:
            raise CommandError("--sample needs a ledger, to estimate the rest; add --ledger.")

    def build_budget(self, models: Iterable[str]) -> Budget | None:
        """Return the budget. ``None`` if nothing needs to be counted.

        Raises:
            CommandError: A feature is used by none of the models, or has no number.
        """
        features = {find_feature(model) for model in models}
        units: dict[str, int] = {}
        for text in self.max_units:
            feature, _, number = text.partition("=")
            feature = feature.strip()
            if (count := read_count(number)) is None:
                raise CommandError(
                    f"--max-units must be FEATURE=N, such as ai_vision=50000, not {text!r:.60}."
                )
            if feature not in features:
                raise CommandError(
                    f"--max-units {text}: no model of this run uses {feature!r}. "
                    f"They use {', '.join(sorted(features))}."
                )
            units[feature] = count
        if self.sample is None and self.max_calls is None and not units:
            return None
        return Budget(calls=self.max_calls, units=units)


NO_LIMITS: Final = SpendingOptions()


def find_feature(model: str) -> str:
    """Return the add-on feature that counts the units of a model."""
    return MODELS[model].feature or model


# The dry run.


@attrs.frozen(kw_only=True)
class Forecast:
    """The work that a run would do.

    Attributes:
        rows: Rows of the input.
        invalid: Items that make no request.
        items: All items: rows times models, and invalid rows once.
        answered: Items with a recorded response or permanent error.
        duplicates: Items with the same request as an earlier item.
        tasks: Submitted tasks to wait for again.
        calls: Calls to make, by model.
        quota: The last recorded remainder of each feature's quota, and its time.
    """

    rows: int
    invalid: int
    items: int
    answered: int
    duplicates: int
    tasks: int
    calls: Mapping[str, int]
    quota: Mapping[str, tuple[Limit, float]]

    def build_record(self) -> dict[str, Any]:
        """Return the plan as a mapping for JSON."""
        return {
            "dry_run": True,
            "rows": self.rows,
            "invalid": self.invalid,
            "items": self.items,
            "answered": self.answered,
            "duplicates": self.duplicates,
            "tasks": self.tasks,
            "calls": dict(self.calls),
            "quota": {
                feature: {"remaining": limit.remaining, "limit": limit.limit, "recorded": recorded}
                for feature, (limit, recorded) in self.quota.items()
            },
        }


def build_forecast(
    inventory: Inventory, *, rows: int, with_ledger: bool, ledger: Path | None
) -> Forecast:
    """Return the work that a run of an input would do.

    Args:
        inventory: The input, compared with the ledger.
        rows: The number of rows of the input.
        with_ledger: Whether equal requests share a call, as they do with a ledger.
        ledger: The ledger, if it already exists.
    """
    calls, duplicates = inventory.calls, inventory.repeated.total()
    if not with_ledger:
        calls, duplicates = calls + inventory.repeated, 0
    return Forecast(
        rows=rows,
        invalid=inventory.bad,
        items=inventory.items,
        answered=inventory.done,
        duplicates=duplicates,
        tasks=inventory.submitted,
        calls=calls,
        quota={} if ledger is None else read_recorded_quota(ledger),
    )


def read_recorded_quota(ledger: Path) -> dict[str, tuple[Limit, float]]:
    """Return the quotas in the newest responses of a ledger, and their times.

    Raises:
        LedgerError: The ledger cannot be read.
    """
    quota: dict[str, tuple[Limit, float]] = {}
    for raw, recorded in read_newest_responses(ledger):
        for limit in find_limits(raw):
            known = quota.get(limit.type)
            if limit.remaining is not None and (known is None or known[1] < recorded):
                quota[limit.type] = (limit, recorded)
    return quota


def print_forecast(console: Console, forecast: Forecast) -> None:
    """Print the work that a run would do."""
    table = build_table("dry run", numbers=("",))
    table.show_header = False
    counts = {
        "rows": forecast.rows,
        "invalid": forecast.invalid,
        "items (rows × models)": forecast.items,
        "answered already": forecast.answered,
        "duplicates": forecast.duplicates,
        "tasks to wait for": forecast.tasks,
        "calls to make": sum(forecast.calls.values()),
    }
    for name, count in counts.items():
        if count or name != "tasks to wait for":
            table.add_row(name, f"{count:,}")
    console.print(table)
    calls: Counter[str] = Counter()
    for model, count in forecast.calls.items():
        calls[find_feature(model)] += count
    by_addon = build_table("add-on", numbers=("calls to make", "quota left", "as of"))
    for feature, count in calls.items():
        known = forecast.quota.get(feature)
        left, when = "unknown", "–"
        if known is not None:
            left = f"{known[0].remaining:,}"
            when = f"{datetime.fromtimestamp(known[1], UTC):%Y-%m-%d %H:%M} UTC"
        by_addon.add_row(Text(feature), f"{count:,}", left, when)
    if calls:
        console.print(by_addon)
    say(console, "Dry run: nothing was sent.", style="bold")


async def perform_dry_run(plan: RunPlan, console: Console) -> ExitCode:
    """Print what a run would send. Neither its ledger nor its output changes.

    Raises:
        CommandError: The run could not begin.
        ConfigurationError: The credentials, the settings or the input are invalid.
        LedgerError: The ledger cannot be used.
    """
    ledger = plan.places.ledger
    async with open_service(
        emulated=plan.emulated, console=console, host=plan.calling.host
    ) as service:
        source = plan.choose_source(service)
        known = None
        if ledger is not None and not plan.emulated and ledger.exists() and ledger.stat().st_size:
            known = ledger
        with tempfile.TemporaryDirectory() as folder:
            async with RunLedger(Path(folder) / "dry-run.ledger") as scratch:
                await scratch.open(**service.identify())
                if known is not None:
                    await scratch.copy_states(known)
                    for path in find_rescued(known):
                        with suppress(LedgerError):  # the run also reports it and leaves it out
                            await scratch.copy_states(path)
                if plan.retry_failed:
                    await scratch.forget_errors()
                book = Book(scratch, False, build_makers(plan.models))
                inventory = await book.register(source, plan.limit)
        forecast = build_forecast(
            inventory, rows=book.rows, with_ledger=ledger is not None, ledger=known
        )
    for line in book.bad_lines:
        say(console, describe_bad_line(line), style="yellow")
    if isinstance(console, MessageConsole) and console.as_json:
        record = forecast.build_record()
        console.log_event("Dry run: nothing was sent.", event="dry_run", forecast=record)
    else:
        print_forecast(console, forecast)
    count, most = sum(forecast.calls.values()), plan.spending.max_calls
    if most is not None and count > most:
        say(console, f"--max-calls stops the run after {most:,} of the {count:,} calls.")
    for limit in plan.spending.max_units:
        say(console, f"--max-units {limit} may stop the run earlier.")
    if plan.places.shared is not None:
        say(console, "What other machines recorded in Redis is not counted as answered.")
    if plan.places.summary is not None:
        write_summary(plan.places.summary, forecast.build_record())
    return ExitCode.DONE


# The sample.


def choose_sample(
    read: Callable[[], Generator[InputItem, None, None]], size: int
) -> Generator[InputItem, None, None]:
    """Yield the items of some rows that are spread evenly over all of them.

    Args:
        read: A generator function that reads the items. Called twice.
        size: The number of rows.
    """
    rows = 0
    with closing(_number_rows(read())) as items:
        for row, _ in items:
            rows = row + 1
    with closing(_number_rows(read())) as items:
        for row, item in items:
            if rows <= size or (row + 1) * size // rows > row * size // rows:
                yield item


def _number_rows(
    items: Generator[InputItem, None, None],
) -> Generator[tuple[int, InputItem], None, None]:
    row, place = -1, None
    with closing(items):
        for item in items:
            if (item.line.file, item.line.number) != place:
                row, place = row + 1, (item.line.file, item.line.number)
            yield row, item


@attrs.define(eq=False)
class _Costs:
    calls: int = 0
    units: float = 0.0
    squares: float = 0.0


@attrs.define(eq=False)
class Estimate:
    """The costs of the calls of a sample, by model."""

    _costs: dict[str, _Costs] = attrs.field(factory=dict, init=False)

    def add(self, outcome: AnyOutcome) -> None:
        """Count an outcome, if it was charged."""
        request, response = outcome.request, outcome.response
        if request is None or response is None or outcome.restored:
            return
        costs = self._costs.setdefault(request.model, _Costs())
        used = sum(limit.used_by_request or 0 for limit in response.limits)
        costs.calls += 1
        costs.units += used
        costs.squares += used * used

    def count_calls(self, model: str) -> int:
        """Return the number of the sample's calls of a model."""
        costs = self._costs.get(model)
        return 0 if costs is None else costs.calls

    def extrapolate(self, left: Mapping[str, int]) -> dict[str, tuple[int, float, float]]:
        """Return the calls left of each feature, their estimated units, and twice the error.

        Args:
            left: The calls left, by model.
        """
        found: dict[str, tuple[int, float, float]] = {}
        for model, count in left.items():
            costs = self._costs.get(model)
            if costs is None or count <= 0:
                continue
            mean = costs.units / costs.calls
            spread = max(0.0, costs.squares / costs.calls - mean * mean)
            error = 2 * count * math.sqrt(spread / costs.calls + spread / count)
            calls, units, errors = found.get(find_feature(model), (0, 0.0, 0.0))
            found[find_feature(model)] = (
                calls + count,
                units + count * mean,
                math.hypot(errors, error),
            )
        return found


def print_estimate(
    console: Console, estimate: Estimate, left: Mapping[str, int], quota: Mapping[str, Limit]
) -> None:
    """Print the estimated cost of the calls left after a sample."""
    found = estimate.extrapolate(left)
    for feature, (calls, units, error) in found.items():
        sentence = f"The other {calls:,} calls will cost about {round(units):,} units of {feature}"
        if error >= 1:
            low, high = max(0, round(units - error)), round(units + error)
            sentence += f" (95 %: {low:,} to {high:,})"
        remaining = quota[feature].remaining if feature in quota else None
        if remaining is not None:
            sentence += f"; {remaining:,} are left"
        say(console, f"{sentence}.")
    if not found and sum(left.values()) > 0:
        say(console, f"{sum(left.values()):,} calls are left; the sample does not show their cost.")


def describe_spent(spent: Spent) -> str:
    """Return the sentences about what a limited run spent."""
    units = ", ".join(f"{count:,} units of {feature}" for feature, count in spent.units.items())
    sentence = f"Spent by this run: {spent.calls:,} calls"
    sentence += f", {units}." if units else "."
    for feature, count in spent.overshoot.items():
        sentence += f" The limit of {feature} was exceeded by {count:,} units."
    return sentence
