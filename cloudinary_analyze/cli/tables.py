"""``cloudinary-analyze export`` and ``report``: results as tables and as a page, at any time."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from rich.console import Console

from cloudinary_analyze.cli.console import CommandError, ExitCode, say
from cloudinary_analyze.cli.results import STANDARD, LedgerExport, is_stream
from cloudinary_analyze.ledger.sqlite import SQLiteLedger
from cloudinary_analyze.results.export import ExportFormat, export_results, write_records
from cloudinary_analyze.results.records import dump_record
from cloudinary_analyze.results.report import write_report

_SQLITE: Final = b"SQLite format 3\0"


def export_ledger(
    ledger: Path, output: str, output_format: ExportFormat, console: Console
) -> ExitCode:
    """Write what a ledger holds, while a run goes on or not.

    Raises:
        CommandError: It cannot be written.
        LedgerError: The ledger cannot be read.
    """
    export = LedgerExport(SQLiteLedger(ledger))
    records = export.iter_records()
    try:
        if output == STANDARD:
            write_records(records, sys.stdout.buffer, output_format)
            sys.stdout.buffer.flush()
        else:
            export_results(records, output, output_format)
    except OSError as error:
        raise _explain(output, error) from None
    tally = export.tally
    sentence = f"{tally.done:,} items in {output}: {tally.done - tally.failed:,} ok, "
    sentence += f"{tally.failed:,} failed"
    if export.unanswered:
        sentence += f"; {export.unanswered:,} more have no outcome yet"
    say(console, f"{sentence}.")
    return ExitCode.DONE


def report_results(results: Path, output: str, console: Console) -> ExitCode:
    """Write the report of a run from its results in JSON Lines, or from its ledger.

    Raises:
        CommandError: The results cannot be read, or the report cannot be written.
        LedgerError: The ledger cannot be read.
    """
    try:
        with results.open("rb") as stream:
            if stream.read(len(_SQLITE)) == _SQLITE:
                return _write(
                    map(dump_record, LedgerExport(SQLiteLedger(results)).iter_records()),
                    results,
                    output,
                    console,
                )
            stream.seek(0)
            return _write(stream, results, output, console)
    except OSError as error:
        raise CommandError(f"{results} cannot be read: {error.strerror}.") from None


def _write(lines: Iterable[bytes], results: Path, output: str, console: Console) -> ExitCode:
    try:
        written = write_report(lines, output)
    except OSError as error:
        raise _explain(output, error) from None
    if not written.results and written.bad_lines:
        raise CommandError(
            f"{results} holds no record of a run, so {output} is empty. Name the results in JSON "
            "Lines, or the ledger of the run."
        )
    say(console, f"{written.results:,} results, {written.pictures:,} pictures in {output}.")
    if written.bad_lines:
        say(console, f"{written.bad_lines:,} lines were no record and left out.", style="yellow")
    return ExitCode.DONE


def _explain(output: str, error: OSError) -> CommandError:
    kept = "" if is_stream(output) else " What was there before is kept."
    return CommandError(
        f"{output} cannot be written: {error.strerror}.{kept}", exit_code=ExitCode.STOPPED
    )
