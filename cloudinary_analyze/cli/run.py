"""``cloudinary-analyze run``: many lines, some models, one file of results."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from typing import Any, Final, Literal

import attrs
from rich.console import Console

from cloudinary_analyze._policy import stops_the_stream
from cloudinary_analyze.cli.feed import ItemFeed, LineSource, build_sample_source
from cloudinary_analyze.cli.ledger import Book, open_book
from cloudinary_analyze.cli.models import BuildRequest
from cloudinary_analyze.cli.notifications import Line, ReceivingOptions, open_line
from cloudinary_analyze.cli.output import LedgerExport, Places, StreamResults
from cloudinary_analyze.cli.screen import (
    STANDARD,
    CommandError,
    ExitCode,
    Reading,
    RunProgress,
    handle_interrupts,
    is_interactive,
    say,
    show_logs,
)
from cloudinary_analyze.cli.service import Service, open_service
from cloudinary_analyze.cli.summary import (
    AGAIN,
    Balance,
    Position,
    Tally,
    decide_ending,
    print_summary,
)
from cloudinary_analyze.config import Settings
from cloudinary_analyze.errors import (
    AnalyzeError,
    BulkStoppedError,
    ConfigurationError,
    ResultNotDeliveredError,
)
from cloudinary_analyze.outcomes import AnyOutcome
from cloudinary_analyze.requests import AnalyzeRequest
from cloudinary_analyze.results.records import InputItem, build_record, dump_record
from cloudinary_analyze.session import AnalyzeSession

SHOWN_BAD_LINES: Final = 10


@attrs.frozen(kw_only=True)
class RunPlan:
    """What to run.

    Attributes:
        models: What builds a request, by wire name.
        source: Where the lines come from; ``None``: the emulator's gallery.
        samples: How many pictures of the gallery.
        places: Where the results go.
        named: Whether the input names its items.
        retry_failed: Whether what failed for good is asked again.
        receiving: How the results arrive.
        permits: Calls in flight at once.
        limit: How many lines to take at the most.
        emulated: Whether to call an emulator in this process.
    """

    models: Mapping[str, BuildRequest]
    source: LineSource | None
    samples: int
    places: Places
    named: bool
    retry_failed: bool
    receiving: ReceivingOptions
    permits: int
    limit: int | None
    emulated: bool

    @property
    def mode(self) -> Literal["call", "task"]:
        """See `AnalyzeSession.map`."""
        return self.receiving.mode

    def build_settings(self) -> Settings:
        """Return the settings of the session."""
        # a result that was never delivered is the one failure that asking again must pay for
        again = self.retry_failed and self.receiving.as_tasks
        return Settings(permits=self.permits, on_missing_result="analyze" if again else "raise")


@attrs.define(eq=False)
class _Run:
    """A run while it lasts."""

    plan: RunPlan
    settings: Settings
    feed: ItemFeed
    session: AnalyzeSession
    console: Console
    book: Book | None
    line: Line | None
    stream: StreamResults | None
    export: LedgerExport | None
    tally: Tally = attrs.field(factory=Tally)
    done: int = 0
    failed: int = 0
    passing: int = 0
    undelivered: int = 0
    bad_lines: int = 0
    stopping: Exception | None = None
    interrupted: bool = False
    work: asyncio.Task[None] | None = None

    def build_request(self, item: InputItem) -> AnalyzeRequest[Any]:
        line = item.line
        if line.error is not None:
            raise line.error
        assert item.model is not None
        assert line.source is not None
        return self.plan.models[item.model](line.source)

    async def consume(self) -> None:
        self.feed.start()
        book = self.book
        async with self.session.map(
            self.feed if book is None else book.note_all(self.feed),
            self.build_request,
            mode=self.plan.mode,
            ledger=None if book is None else book.ledger,
            key=_read_name if self.plan.named else None,
        ) as stream:
            async for outcome in stream:
                await self._take(outcome)

    async def _take(self, outcome: AnyOutcome) -> None:
        error, item = outcome.error, outcome.item
        if isinstance(error, BulkStoppedError):
            self.stopping = error.reason or error  # it was not sent, and is left for another run
        elif error is not None and stops_the_stream(error, self.settings):
            self.stopping = error
        elif self.book is not None and await self.book.note_outcome(outcome, self.settings):
            if isinstance(error, ResultNotDeliveredError):
                self.undelivered += 1
            else:
                self.passing += 1
        if self.stream is not None:
            record = build_record(outcome)
            await self.stream.write(dump_record(record))
            self.tally.add(record)
        if self.line is not None:
            self.line.take_note(outcome)
        self.feed.finish(item)
        self.done += 1
        self.failed += error is not None
        if item.line.error is not None:
            self._report_bad_line(item)

    def _report_bad_line(self, item: InputItem) -> None:
        self.bad_lines += 1
        if self.bad_lines <= SHOWN_BAD_LINES:
            say(self.console, f"line {item.line.number}: {item.line.error}", style="yellow")
        elif self.bad_lines == SHOWN_BAD_LINES + 1:
            say(self.console, "Further bad lines are told in the results alone.", style="yellow")

    def interrupt(self) -> None:
        """Finish what is in flight; when asked again, give it up; and so the writing at the end."""
        if self.work is None:
            if self.export is not None:
                self.export.halt()
        elif self.interrupted:
            self.work.cancel()
        else:
            self.interrupted = True
            self.feed.stop()
            say(self.console, self._describe_flight(), style="bold")

    def _describe_flight(self) -> str:
        if self.plan.mode == "task":
            count, what = self.session.stats.pending, "task"
        else:
            count, what = self.session.stats.in_flight, "call"
        return (
            f"Interrupted: {count} {what if count == 1 else f'{what}s'} in flight will be "
            "finished and written. A second interrupt aborts."
        )

    def measure(self) -> Reading:
        return Reading(
            done=self.feed.skipped_items + self.done,
            failed=self.failed,
            total=self.feed.total_items,
            quota={} if self.plan.emulated else self.session.quota,
        )

    async def weigh(self) -> Balance | str | None:
        if self.export is None:
            return None
        if not self.export.counted:
            return AGAIN
        return Balance(
            answered=self.tally.done - self.tally.failed,
            failed=self.tally.failed,
            passing=self.passing,
            undelivered=self.undelivered,
            total=await self.feed.wait_for_total(),
            lasting=not self.plan.emulated,
        )

    def locate(self) -> Position:
        return Position(
            finished_through=self.feed.finished_through,
            begun_lines=self.feed.skipped_lines + self.feed.pulled_lines,
            total_lines=self.feed.total_lines,
            exhausted=self.feed.exhausted,
        )


def _read_name(item: InputItem) -> str:
    return item.line.name or ""


async def perform_run(plan: RunPlan, console: Console) -> ExitCode:
    """Run a plan and print its summary.

    Raises:
        CommandError: It could not begin.
        ConfigurationError: The credentials, the settings or the input cannot be right.
        LedgerError: The ledger cannot be used.
    """
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(
            open_service(emulated=plan.emulated, console=console)
        )
        stack.enter_context(show_logs(console))
        run = await _prepare(plan, service, console, stack)
        with handle_interrupts(run.interrupt, run.interrupt):
            return await _perform(run)


async def _prepare(
    plan: RunPlan, service: Service, console: Console, stack: AsyncExitStack
) -> _Run:
    source, places = plan.source, plan.places
    if source is None:
        assert service.emulator is not None
        source = build_sample_source(service.emulator.sample_urls(plan.samples))
    settings = plan.build_settings()
    line = await stack.enter_async_context(open_line(plan.receiving, service, console))
    stream = stack.enter_context(StreamResults(places.output)) if places.streamed else None
    book = None
    if places.ledger is not None:
        book = await stack.enter_async_context(
            open_book(
                places.ledger,
                service,
                plan.models,
                retry_failed=plan.retry_failed,
                console=console,
            )
        )
    # a stream is told of what was done before, too, so nothing is passed over then
    earlier = book.open_earlier if book is not None and stream is None else None
    session = AnalyzeSession(
        service.credentials,
        settings=settings,
        notifications=None if line is None else line.source,
        notification_url=None if line is None else line.url,
        on_event=None if line is None else line.hear,
    )
    return _Run(
        plan=plan,
        settings=settings,
        feed=ItemFeed(source, tuple(plan.models), plan.limit, earlier),
        session=session,
        console=console,
        book=book,
        line=line,
        stream=stream,
        export=None if book is None else LedgerExport(book.ledger),
    )


async def _perform(run: _Run) -> ExitCode:
    plan, feed, console = run.plan, run.feed, run.console
    drawn = is_interactive(sys.stderr) and not (
        plan.places.output == STANDARD and sys.stdout.isatty()  # the results would tear it
    )
    async with run.session:
        run.work = work = asyncio.create_task(run.consume())
        await _drive(run, work, console if drawn else None)
    run.work = None
    aborted = work.cancelled()
    failure = None if aborted else work.exception()
    if isinstance(failure, ConfigurationError) and not run.done:
        raise failure
    place, unwritten = await _settle(run)
    ending = decide_ending(
        run.locate(),
        failed=run.tally.failed,
        balance=await run.weigh(),
        failure=failure,
        stopping=run.stopping,
        interrupted=run.interrupted,
        aborted=aborted,
        as_tasks=plan.mode == "task",
    )
    print_summary(
        console,
        run.tally,
        quota={} if plan.emulated else run.session.quota,  # the emulator's never runs down
        stats=run.session.stats,
        skipped=feed.skipped_items,
        place=place,
    )
    if ending.sentence:
        say(console, ending.sentence, style="bold")
    if unwritten is not None:
        say(console, str(unwritten), style="red")
        return max(ending.exit_code, unwritten.exit_code)
    return ending.exit_code


async def _drive(run: _Run, work: asyncio.Task[None], console: Console | None) -> None:
    """Run to the end, whatever it is."""
    try:
        async with RunProgress(console, run.measure):
            await asyncio.wait({work})
    finally:
        run.feed.stop()
        if work.cancel():
            await asyncio.wait({work})


async def _settle(run: _Run) -> tuple[str, CommandError | None]:
    """Write the results of a run that is over; return where they are, or why they are not."""
    book, export = run.book, run.export
    if book is None or export is None:
        assert run.stream is not None
        return run.stream.place, None
    try:
        with suppress(AnalyzeError):  # the stream has told of a ledger that broke
            total = run.feed.total_items
            if run.feed.exhausted and total is not None:
                await book.ledger.keep_items(total)
            await book.ledger.flush()
        place = await export.write(
            run.plan.places, keep_earlier=book.displaced or not book.begun_before
        )
    except AnalyzeError as error:
        return "", CommandError(error.message, exit_code=ExitCode.STOPPED)
    except CommandError as error:
        return "", error
    finally:
        run.tally = export.tally
    return place, None
