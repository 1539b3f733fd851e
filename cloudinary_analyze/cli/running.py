"""A run while it lasts: how it takes outcomes, what it counts, and how it is interrupted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any, Literal

import attrs
from rich.console import Console

from cloudinary_analyze._budget import Spent
from cloudinary_analyze._policy import Stop, find_stop, is_final
from cloudinary_analyze.cli.feed import (
    ItemFeed,
    LineSource,
    describe_bad_line,
    describe_line,
    read_items,
)
from cloudinary_analyze.cli.files import set_aside
from cloudinary_analyze.cli.ledger import SHOWN_BAD_LINES, Book, HaltedError
from cloudinary_analyze.cli.money import (
    Estimate,
    choose_sample,
    describe_spent,
    find_feature,
    print_estimate,
)
from cloudinary_analyze.cli.notifications import Line
from cloudinary_analyze.cli.output import LedgerExport, StreamResults
from cloudinary_analyze.cli.plan import RunPlan
from cloudinary_analyze.cli.screen import (
    CommandError,
    say,
)
from cloudinary_analyze.cli.summary import (
    AGAIN,
    Balance,
    Position,
)
from cloudinary_analyze.config import Settings
from cloudinary_analyze.errors import (
    AnalyzeError,
    BulkStoppedError,
    ResultNotDeliveredError,
)
from cloudinary_analyze.ledger.items import Inventory, RecordSet
from cloudinary_analyze.outcomes import AnyOutcome
from cloudinary_analyze.progress import Reading
from cloudinary_analyze.requests import MODELS, AnalyzeRequest
from cloudinary_analyze.responses import Limit
from cloudinary_analyze.results.records import (
    InputItem,
    InputLine,
    build_line_record,
    build_record,
    dump_record,
)
from cloudinary_analyze.results.statistics import Durations, Statistics
from cloudinary_analyze.session import CALL_WINDOW, AnalyzeSession

if TYPE_CHECKING:
    from cloudinary_analyze._stream import OutcomeStream


@attrs.define(eq=False)
class Run:
    """The state of a run.

    Legal stages: ``"reading"`` the input, ``"working"``, ``"writing"`` the results; in this order.
    """

    plan: RunPlan
    source: LineSource
    settings: Settings
    session: AnalyzeSession
    console: Console
    book: Book | None
    line: Line | None
    stream: StreamResults | None
    export: LedgerExport | None
    feed: ItemFeed = attrs.field(init=False)
    stage: Literal["reading", "working", "writing"] = "reading"
    inventory: Inventory | None = None
    answered_before: RecordSet = attrs.field(factory=RecordSet)
    statistics: Statistics = attrs.field(factory=Statistics)
    done: int = 0
    failed: int = 0
    passing: int = 0
    undelivered: int = 0
    bad_lines: int = 0
    cut: int = 0  # items that an interrupt left unsent, or with an error that a retry may solve
    stops: dict[str, Exception] = attrs.field(factory=dict)
    estimate: Estimate = attrs.field(factory=Estimate)
    spent: Spent | None = None
    queued: Durations = attrs.field(factory=Durations)
    interrupted: bool = False  # at any stage but writing
    outcomes: OutcomeStream[InputItem, Any] | None = None
    work: asyncio.Task[None] | None = None

    @property
    def total(self) -> int | None:
        """The number of items. ``None`` if unknown."""
        if self.inventory is not None:
            return self.inventory.items
        return self.feed.pulled if self.feed.exhausted else None

    async def prepare_input(self) -> None:
        """Read the input into the ledger, if it can be read twice; otherwise it is read meanwhile.

        Raises:
            HaltedError: An interrupt ended it.
            CommandError: The input has no rows, or cannot be read to its end.
            ConfigurationError: The input is invalid as a whole.
            LedgerError: The ledger cannot be written.
        """
        plan, source, book = self.plan, self.source, self.book
        if book is not None and source.repeatable:
            try:
                inventory = self.inventory = await book.register(source, plan.limit)
            except OSError as error:
                raise CommandError(f"The input could not be read: {error.strerror}.") from None
            self._report_inventory(book, inventory)
            # a stream shows what was answered before, too
            open_only = self.stream is None
            self._feed_from(lambda: book.read_items(open_only=open_only))
            return
        if book is not None:
            self.answered_before = book.ledger.answered_items()
            await book.clear()
        models = tuple(plan.models)
        self._feed_from(lambda: read_items(source, models, plan.limit))

    def _feed_from(self, read: Callable[[], Generator[InputItem, None, None]]) -> None:
        size = self.plan.spending.sample
        chosen = read if size is None else lambda: choose_sample(read, size)
        self.feed = ItemFeed(chosen, len(self.plan.models))

    def _report_inventory(self, book: Book, inventory: Inventory) -> None:
        if inventory.other and inventory.changed:
            say(
                self.console,
                f"The ledger {book.ledger.path} also holds {inventory.other:,} results of another "
                "input, other models or other parameters. They stay in it; the output will hold "
                f"this input only. Of its {inventory.items:,} items, {inventory.done:,} are "
                "answered already.",
                style="yellow",
            )
        if self.stream is None and (inventory.displaced or not book.begun_before):
            self.set_aside_output()
        for line in book.bad_lines:
            self._report_bad_line(line)
        if inventory.bad > SHOWN_BAD_LINES:
            self.bad_lines = SHOWN_BAD_LINES
            self._report_bad_line(None)

    def set_aside_output(self) -> None:
        """Rename the file of results, if it holds those of another input."""
        kept = set_aside(self.plan.places.output)
        if kept is not None:
            say(self.console, f"The earlier file {self.plan.places.output} is now {kept}.")

    def begin(self) -> asyncio.Task[None]:
        """Begin to work, and return the task that does.

        Raises:
            HaltedError: An interrupt arrived while the input was read.
        """
        if self.interrupted:
            raise HaltedError
        self.work = asyncio.create_task(self.consume())
        self.stage = "working"
        return self.work

    async def consume(self) -> None:
        """Take every outcome of the stream."""
        self.feed.start()
        book = self.book
        async with self.session.map(
            self._pull(),
            self._build_request,
            mode=self.plan.mode,
            window=self._choose_window(),
            ledger=None if book is None else book.ledger,
            key=_read_name if self.plan.named else None,
            budget=self.plan.spending.build_budget(self.plan.models),
        ) as self.outcomes:
            # a refusal of the first model must not end the stream before the others are read
            self.outcomes._pump.stops.seen.update(self._find_features())  # noqa: SLF001
            try:
                async for outcome in self.outcomes:
                    await self._take(outcome)
            finally:
                self.spent = self.outcomes.spent

    async def _pull(self) -> AsyncIterator[InputItem]:
        """Yield the items that make a request. Note them if the input is read only now.

        Items of a stopped kind stay in the ledger for another run, so that a long series of them
        does not end the stream.
        """
        async for item in self.feed:
            if self.book is not None and self.inventory is None:
                await self.book.note(item)
            if item.line.error is not None:
                await self._take_bad_line(item)
            elif self.stops and self.stream is None and self._is_stopped(item.model or ""):
                self.feed.finish(item)
            else:
                if self.book is not None and item.key is not None:
                    self.book.ledger.expect(item.key)
                yield item

    def _is_stopped(self, model: str) -> bool:
        """Whether a model is stopped, but others are not."""
        stopped = {
            name for name in self.plan.models if {name, find_feature(name), ""} & {*self.stops}
        }
        return model in stopped and len(stopped) < len(self.plan.models)

    def _find_features(self) -> dict[str, str | None]:
        """Return the models that have something left to do, and their features."""
        models = set(self.plan.models)
        if self.inventory is not None and not self.inventory.submitted:
            models &= {*self.inventory.calls}
        return {model: MODELS[model].feature for model in models}

    def _choose_window(self) -> int | None:
        """Return a window with room for each model. ``None``: the default window has it."""
        room = 2 * len(self.plan.models)
        default = CALL_WINDOW * self.settings.permits
        return None if self.plan.receiving.as_tasks or default >= room else room

    def _build_request(self, item: InputItem) -> AnalyzeRequest[Any]:
        assert item.model is not None
        assert item.line.source is not None
        return self.plan.models[item.model](item.line.source)

    async def _take_bad_line(self, item: InputItem) -> None:
        if self.stream is not None:
            await self._write(build_line_record(item))
        self.feed.finish(item)
        self.done += 1
        self.failed += 1
        if self.inventory is None:  # otherwise it was already reported
            self._report_bad_line(item.line)

    async def _take(self, outcome: AnyOutcome) -> None:
        error, item = outcome.error, outcome.item
        if type(error) is BulkStoppedError and error.reason is None:
            self.cut += 1  # Ctrl-C arrived before it was sent
            return
        stopped = error is not None and (
            isinstance(error, BulkStoppedError) or find_stop(error, self.settings) is not None
        )
        if error is not None and stopped:
            self._note_stop(outcome, error)
        elif self.book is not None and await self.book.note_failure(outcome, self.settings):
            if isinstance(error, ResultNotDeliveredError):
                self.undelivered += 1
            else:
                self.passing += 1
        cut = self.interrupted and error is not None
        cut = cut and not (isinstance(error, AnalyzeError) and is_final(error))
        self.cut += cut
        if self.stream is not None:
            await self._write(build_record(outcome))
        if self.line is not None:
            self.line.note_outcome(outcome)
        if self.plan.spending.sample is not None:
            self.estimate.add(outcome)
        if not cut:
            self.feed.finish(item)
        if self.stream is not None or not stopped:  # otherwise it is left for another run
            self.done += 1
            self.failed += error is not None
        if not outcome.restored:
            self.queued.add(outcome.queued)

    def _note_stop(self, outcome: AnyOutcome, error: Exception) -> None:
        """Note which requests are stopped, and why. Unsent items are left for another run."""
        reason = error
        if isinstance(error, BulkStoppedError) and error.reason is not None:
            reason = error.reason
        stop, name = find_stop(reason, self.settings), ""
        if outcome.request is not None and stop in {Stop.FEATURE, Stop.MODEL}:
            model = outcome.request.model
            name = find_feature(model) if stop is Stop.FEATURE else model
        self.stops.setdefault(name, reason)

    async def _write(self, record: Mapping[str, Any]) -> None:
        assert self.stream is not None
        await self.stream.write(dump_record(record))
        self.statistics.add(record)

    def _report_bad_line(self, line: InputLine | None) -> None:
        self.bad_lines += 1
        if self.bad_lines <= SHOWN_BAD_LINES and line is not None:
            say(self.console, describe_bad_line(line), style="yellow")
        elif self.bad_lines == SHOWN_BAD_LINES + 1:
            say(
                self.console,
                "Further invalid lines are listed only in the results.",
                style="yellow",
            )

    def interrupt(self) -> None:
        """Finish the calls in flight. At a second call, abort them. Also ends reading and writing."""
        if self.stage == "reading":
            self.interrupted = True
            if self.book is not None:
                self.book.halt()
        elif self.stage == "writing":
            if self.export is not None:
                self.export.halt()
        elif self.interrupted:
            assert self.work is not None
            self.work.cancel()
        else:
            self.interrupted = True
            self.feed.stop()
            if self.outcomes is not None:
                self.outcomes.stop()
            say(self.console, self._describe_flight(), style="bold")

    def end(self) -> None:
        """Abort at once. The ledger keeps the recorded results, and no output is written from it."""
        if self.book is not None:
            self.book.halt()
        if self.export is not None:
            self.export.halt()
        self.interrupted = True
        if self.stage == "working" and self.work is not None:
            self.work.cancel()

    def _describe_flight(self) -> str:
        if self.plan.mode == "task":
            count, what = self.session.stats.pending, "task"
        else:
            count, what = self.session.stats.permits_in_use, "call"
        return (
            f"Interrupted: {count} {what if count == 1 else f'{what}s'} in flight will be "
            "finished and written. A second interrupt aborts."
        )

    def measure(self) -> Reading:
        """Return the progress so far."""
        inventory = self.inventory
        earlier = 0
        if inventory is not None and self.stream is None:
            earlier = inventory.done + inventory.bad
        return Reading(
            done=earlier + self.done,
            failed=self.failed,
            total=self.total,
            tasks=None if self.plan.mode == "call" else self._count_tasks(),
            notifications=sum(self.session.stats.notifications.values()),
            quota=self.quota,
        )

    def _count_tasks(self) -> tuple[int, int, int]:
        stats = self.session.stats
        resumed = 0 if self.inventory is None else self.inventory.submitted
        accepted = max(stats.accepted + resumed, stats.pending)
        return accepted, accepted - stats.pending, stats.pending

    @property
    def quota(self) -> Mapping[str, Limit]:
        """The quotas. Empty for an emulator, whose quotas never run out."""
        return {} if self.plan.emulated else self.session.quota

    def weigh(self) -> Balance | str | None:
        """Return what the ledger holds, or why that is unknown; ``None`` without a ledger."""
        if self.export is None:
            return None
        if not self.export.counted:
            return AGAIN
        return Balance(
            answered=self.statistics.ok,
            failed=self.statistics.failed,
            passing=self.passing,
            undelivered=self.undelivered,
            invalid=self.statistics.bad_lines,
            total=self.total,
            lasting=not self.plan.emulated,
        )

    def report_costs(self) -> None:
        """Print what a limited run spent, and the estimated cost of the rest after a sample."""
        if self.spent is not None:
            say(self.console, describe_spent(self.spent))
        if self.plan.spending.sample is not None and self.inventory is not None:
            calls = self.inventory.calls
            left = {model: calls[model] - self.estimate.count_calls(model) for model in calls}
            print_estimate(self.console, self.estimate, left, self.quota)

    def locate(self) -> Position:
        """Return how far the run came in its input."""
        through = self.feed.finished_through
        return Position(
            finished_through=None if through is None else describe_line(through[1], through[0]),
            exhausted=self.feed.exhausted,
            cut=self.cut > 0,
        )


def _read_name(item: InputItem) -> str:
    return item.line.name or ""
