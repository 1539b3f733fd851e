"""``cloudinary-analyze run``: many lines, some models, one file of results."""

from __future__ import annotations

import asyncio
import shlex
import sys
from contextlib import AsyncExitStack, suppress
from functools import partial

from rich.console import Console

from cloudinary_analyze.cli.ledger import HaltedError, open_book
from cloudinary_analyze.cli.notifications import open_line
from cloudinary_analyze.cli.output import LedgerExport, StreamResults, write_summary
from cloudinary_analyze.cli.plan import RunPlan
from cloudinary_analyze.cli.running import Run
from cloudinary_analyze.cli.screen import (
    STANDARD,
    CommandError,
    ExitCode,
    MessageConsole,
    handle_interrupts,
    is_interactive,
    report_progress,
    say,
    show_logs,
)
from cloudinary_analyze.cli.service import Service, open_service
from cloudinary_analyze.cli.shared import SharedRunLedger, build_shared_ledger
from cloudinary_analyze.cli.summary import (
    Ending,
    build_summary,
    decide_ending,
    print_summary,
)
from cloudinary_analyze.errors import (
    AnalyzeError,
    ConfigurationError,
)
from cloudinary_analyze.progress import ProgressReporter
from cloudinary_analyze.session import AnalyzeSession


async def perform_run(plan: RunPlan, console: Console) -> ExitCode:
    """Run a plan and print its summary.

    Raises:
        CommandError: It could not begin.
        ConfigurationError: The credentials, the settings or the input are invalid.
        LedgerError: The ledger cannot be used.
    """
    async with AsyncExitStack() as stack:
        service = await stack.enter_async_context(
            open_service(emulated=plan.emulated, console=console, host=plan.calling.host)
        )
        stack.enter_context(show_logs(console))
        run = await _prepare(plan, service, console, stack)
        with handle_interrupts(run.interrupt, run.interrupt, run.end):
            try:
                await run.prepare_input()
                return await _perform(run)
            except HaltedError:
                raise CommandError(
                    "Interrupted while the input was read. Nothing was sent.",
                    exit_code=ExitCode.INTERRUPTED,
                ) from None


async def _prepare(plan: RunPlan, service: Service, console: Console, stack: AsyncExitStack) -> Run:
    source, places = plan.choose_source(service), plan.places
    if plan.spending.sample is not None and not source.repeatable:
        raise CommandError("--sample reads the input twice, so it needs a file, not a pipe.")
    settings = plan.build_settings(service)
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
                patience=plan.calling.ledger_patience,
                console=console,
                make=None
                if places.shared is None
                else partial(SharedRunLedger, shared=build_shared_ledger(places.shared)),
            )
        )
    session = AnalyzeSession(
        service.credentials,
        settings=settings,
        notifications=None if line is None else line.source,
        notification_url=None if line is None else line.url,
        on_event=None if line is None else line.hear,
    )
    return Run(
        plan=plan,
        source=source,
        settings=settings,
        session=session,
        console=console,
        book=book,
        line=line,
        stream=stream,
        export=None if book is None else LedgerExport(book.ledger),
    )


async def _perform(run: Run) -> ExitCode:
    plan, console = run.plan, run.console
    drawn = (
        is_interactive(sys.stderr)
        and plan.display.log_format == "text"
        # results on the same terminal would break the bar
        and not (plan.places.output == STANDARD and sys.stdout.isatty())
    )
    async with run.session:
        work = run.begin()
        await _drive(run, work, console if drawn else None)
    run.stage = "writing"
    aborted = work.cancelled()
    failure = None if aborted else work.exception()
    if isinstance(failure, ConfigurationError) and not run.done:
        raise failure
    if run.total == 0:
        raise CommandError(f"The input, {run.source.name}, has no rows. Nothing was sent.")
    place, unwritten = await _settle(run)
    ending = decide_ending(
        run.locate(),
        failed=run.statistics.failed,
        balance=run.weigh(),
        failure=failure,
        stops=run.stops,
        interrupted=run.interrupted,
        aborted=aborted,
        as_tasks=plan.mode == "task",
    )
    _report_end(run, ending, place)
    if unwritten is not None:
        say(console, str(unwritten), style="red")
        return max(ending.exit_code, unwritten.exit_code)
    return ending.exit_code


def _report_end(run: Run, ending: Ending, place: str) -> None:
    """Print the closing tables and sentences, and write the summary."""
    places, console = run.plan.places, run.console
    stats = run.session.stats
    skipped = 0 if run.inventory is None else run.inventory.done
    counted = run.export is None or run.export.counted
    if counted and not run.plan.display.quiet:
        print_summary(
            console,
            run.statistics,
            quota=run.quota,
            stats=stats,
            skipped=skipped,
            queued=run.queued,
            place=place,
        )
        if place and not places.streamed and places.report is None and run.statistics.total:
            results = places.output if places.output_format == "jsonl" else places.ledger
            say(console, f"Report: cloudinary-analyze report {shlex.quote(str(results))}")
    run.report_costs()
    if ending.sentence:
        say(console, ending.sentence, style="bold")
    summary = {
        "exit_code": int(ending.exit_code),
        "message": ending.sentence,
        **build_summary(
            run.statistics if counted else None,
            total=run.total,
            skipped=skipped,
            queued=run.queued,
            stats=stats,
            quota=run.quota,
        ),
        "stopped": {name or "everything": str(reason) for name, reason in run.stops.items()},
        "output": places.output,
        "ledger": None if places.ledger is None else str(places.ledger),
    }
    if isinstance(console, MessageConsole) and console.as_json:
        console.log_event("The run has ended.", event="summary", summary=summary)
    if places.summary is not None:
        write_summary(places.summary, summary)


async def _drive(run: Run, work: asyncio.Task[None], console: Console | None) -> None:
    """Run until the input, an error or an interrupt ends the run."""
    try:
        async with AsyncExitStack() as stack:
            if not run.plan.display.quiet:
                report = partial(report_progress, run.console)
                await stack.enter_async_context(ProgressReporter(run.measure, console, report))
            await asyncio.wait({work})
    finally:
        run.feed.stop()
        if work.cancel():
            await asyncio.wait({work})


async def _settle(run: Run) -> tuple[str, CommandError | None]:
    """Write the results of a finished run. Return where they are, or the error."""
    book, export = run.book, run.export
    if book is None or export is None:
        assert run.stream is not None
        return run.stream.place, None
    try:
        with suppress(AnalyzeError):  # the stream has already reported the ledger's error
            await book.ledger.flush()
        if (
            run.inventory is None
            and run.stream is None
            and not (
                book.begun_before and run.answered_before.is_within(book.ledger.answered_items())
            )
        ):
            run.set_aside_output()
        place = await export.write(run.plan.places, source=run.source.name)
    except AnalyzeError as error:
        return "", CommandError(error.message, exit_code=ExitCode.STOPPED)
    except CommandError as error:
        return "", error
    finally:
        run.statistics = export.statistics
    return place, None
