"""``cloudinary-analyze run``: many lines, some models, one file of results."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import Any, Final

import attrs
from rich.console import Console

from cloudinary_analyze._map import stops_the_stream
from cloudinary_analyze.bulk.input import InputItem
from cloudinary_analyze.bulk.records import build_record, dump_record
from cloudinary_analyze.cli.choices import BuildRequest
from cloudinary_analyze.cli.console import ExitCode, is_interactive, say, show_logs
from cloudinary_analyze.cli.ending import Position, decide_ending
from cloudinary_analyze.cli.feed import ItemFeed, LineSource
from cloudinary_analyze.cli.interrupts import handle_interrupts
from cloudinary_analyze.cli.progress import Reading, RunProgress
from cloudinary_analyze.cli.results import STANDARD, ResultWriter, choose_writer
from cloudinary_analyze.cli.service import open_service
from cloudinary_analyze.cli.sources import build_sample_source
from cloudinary_analyze.cli.summary import Tally, print_summary
from cloudinary_analyze.config import Settings
from cloudinary_analyze.errors import ConfigurationError
from cloudinary_analyze.requests import AnalyzeRequest
from cloudinary_analyze.session import AnalyzeSession

SHOWN_BAD_LINES: Final = 10


@attrs.frozen(kw_only=True)
class RunPlan:
    """What to run.

    Attributes:
        models: What builds a request, by wire name.
        source: Where the lines come from; ``None``: the emulator's gallery.
        samples: How many pictures of the gallery.
        output: Where the results go.
        permits: Calls in flight at once.
        limit: How many lines to take at the most.
        emulated: Whether to call an emulator in this process.
    """

    models: Mapping[str, BuildRequest]
    source: LineSource | None
    samples: int
    output: str
    permits: int
    limit: int | None
    emulated: bool


@attrs.define(eq=False)
class _Run:
    """A run while it lasts."""

    models: Mapping[str, BuildRequest]
    settings: Settings
    feed: ItemFeed
    session: AnalyzeSession
    writer: ResultWriter
    console: Console
    tally: Tally = attrs.field(factory=Tally)
    bad_lines: int = 0
    stopping: Exception | None = None

    def build_request(self, item: InputItem) -> AnalyzeRequest[Any]:
        line = item.line
        if line.error is not None:
            raise line.error
        assert item.model is not None
        assert line.source is not None
        return self.models[item.model](line.source)

    async def consume(self) -> None:
        self.feed.start()
        async with self.session.map(self.feed, self.build_request) as stream:
            async for outcome in stream:
                await self.writer.write(dump_record(build_record(outcome)))
                self.feed.finish(outcome.item)
                self.tally.add(outcome)
                error = outcome.error
                if error is not None and stops_the_stream(error, self.settings):
                    self.stopping = error
                if outcome.item.line.error is not None:
                    self.report_bad_line(outcome.item)

    def report_bad_line(self, item: InputItem) -> None:
        self.bad_lines += 1
        if self.bad_lines <= SHOWN_BAD_LINES:
            say(self.console, f"line {item.line.number}: {item.line.error}", style="yellow")
        elif self.bad_lines == SHOWN_BAD_LINES + 1:
            say(self.console, "Further bad lines are told in the results alone.", style="yellow")

    def finish(self) -> None:
        self.feed.stop()
        count = self.session.stats.in_flight
        say(
            self.console,
            f"Interrupted: {count} {'call' if count == 1 else 'calls'} in flight will be "
            "finished and written. A second interrupt aborts.",
            style="bold",
        )

    def measure(self) -> Reading:
        return Reading(
            done=self.tally.done,
            failed=self.tally.failed,
            total=self.feed.total_items,
            quota=self.session.quota,
        )

    def locate(self) -> Position:
        return Position(
            finished_through=self.feed.finished_through,
            pulled_lines=self.feed.pulled_lines,
            total_lines=self.feed.total_lines,
            exhausted=self.feed.exhausted,
        )


async def perform_run(plan: RunPlan, console: Console) -> ExitCode:
    """Run a plan and print its summary.

    Raises:
        CommandError: It could not begin.
        ConfigurationError: The credentials, the settings or the input cannot be right.
    """
    writer = choose_writer(plan.output)
    settings = Settings(permits=plan.permits)
    async with open_service(emulated=plan.emulated, console=console) as service:
        source = plan.source
        if source is None:
            assert service.emulator is not None
            source = build_sample_source(service.emulator.sample_urls(plan.samples))
        feed = ItemFeed(source, tuple(plan.models), plan.limit)
        session = AnalyzeSession(service.credentials, settings=settings)
        run = _Run(plan.models, settings, feed, session, writer, console)
        drawn = is_interactive(sys.stderr) and not (
            plan.output == STANDARD and sys.stdout.isatty()  # the results would tear it
        )
        with writer, show_logs(console):
            async with session:
                work = await _drive(run, console if drawn else None)
            aborted = work.cancelled()
            failure = None if aborted else work.exception()
            if isinstance(failure, ConfigurationError) and not run.tally.done:
                raise failure
            ending = decide_ending(
                run.locate(),
                failed=run.tally.failed,
                failure=failure,
                stopping=run.stopping,
                interrupted=feed.stopped,
                aborted=aborted,
            )
    print_summary(console, run.tally, quota=session.quota, stats=session.stats, place=writer.place)
    if ending.sentence:
        say(console, ending.sentence, style="bold")
    return ending.exit_code


async def _drive(run: _Run, console: Console | None) -> asyncio.Task[None]:
    """Run to the end, whatever it is, and return the task that is over."""
    work = asyncio.create_task(run.consume())
    try:
        async with RunProgress(console, run.measure):
            with handle_interrupts(run.finish, work.cancel):
                await asyncio.wait({work})
    finally:
        run.feed.stop()
        if work.cancel():
            await asyncio.wait({work})
    return work
