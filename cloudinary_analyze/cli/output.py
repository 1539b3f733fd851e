"""The output of a run (a file written from the ledger, or a stream), `export` and `report`."""

from __future__ import annotations

import asyncio
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import attrs
from cyclopts import Parameter
from rich.console import Console

from cloudinary_analyze.cli.files import (
    check_conflicts,
    check_ledger,
    check_output,
    is_database,
    is_stream,
)
from cloudinary_analyze.cli.ledger import HaltedError
from cloudinary_analyze.cli.outlet import Outlet, escape_controls
from cloudinary_analyze.cli.screen import STANDARD, CommandError, ExitCode, explain_stdout, say
from cloudinary_analyze.cli.shared import SharedItems, build_shared_ledger, is_shared
from cloudinary_analyze.errors import ConfigurationError
from cloudinary_analyze.ledger.items import LedgerItem
from cloudinary_analyze.ledger.sqlite import SQLiteLedger
from cloudinary_analyze.requests import read_model_name
from cloudinary_analyze.results.export import (
    NO_COLUMNS,
    ExportFormat,
    OwnColumns,
    export_results,
    find_own_columns,
    write_records,
)
from cloudinary_analyze.results.files import open_replacement
from cloudinary_analyze.results.records import build_ledger_record, dump_record
from cloudinary_analyze.results.report import DEFAULT_TITLE, write_report
from cloudinary_analyze.results.statistics import Statistics

LEDGER_SUFFIX: Final = ".ledger"

_FORMATS: Final[dict[str, ExportFormat]] = {
    "": "jsonl",
    ".json": "jsonl",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
    ".pq": "parquet",
}


def detect_output_format(name: str) -> ExportFormat:
    """Return the format of an output by its extension. JSON Lines if it has no extension.

    Raises:
        CommandError: The extension is unknown.
    """
    suffix = Path(name).suffix.lower()
    if suffix not in _FORMATS:
        known = ", ".join(filter(None, _FORMATS))
        raise CommandError(
            f"Unknown extension {suffix!r} of the output {name}. Known: {known}. Or name its "
            "format with --format."
        )
    return _FORMATS[suffix]


def check_extra(wanted: bool, module: str, extra: str, what: str) -> None:
    """Check in advance that an optional library is installed.

    Raises:
        CommandError: It is not installed.
    """
    if wanted and find_spec(module) is None:
        raise CommandError(
            f"{what} needs the package {module}, which is not installed: "
            f"pip install 'cloudinary-analyze[{extra}]'"
        )


ExportFormatOption = Annotated[
    ExportFormat | None,
    Parameter(
        name="--format", help="Format of the output. Default: by its extension, else JSON Lines."
    ),
]


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class OutputOptions:
    """Where the results of a run go.

    Attributes:
        output: The file, or ``-``.
        output_format: Its format; ``None``: by its extension.
        ledger: The file of the ledger; ``None``: beside the output.
        report: The file of the report, if one is wanted.
        summary: The file of the summary, if one is wanted.
    """

    output: Annotated[
        str,
        Parameter(
            name=["--output", "-o"],
            help="Where the results go; - is stdout, as JSON Lines.",
            allow_leading_hyphen=True,
        ),
    ] = "results.jsonl"
    output_format: ExportFormatOption = None
    ledger: Annotated[
        str | None,
        Parameter(
            name="--ledger",
            help="File of the ledger (default: OUTPUT.ledger), or redis://HOST/0 to share the work "
            "with other machines. Its password comes from REDIS_URL.",
        ),
    ] = None
    report: Annotated[
        Path | None, Parameter(name="--report", help="Also write an HTML report of the results.")
    ] = None
    summary: Annotated[
        Path | None,
        Parameter(name="--summary-json", help="Also write the counts of the run, as JSON."),
    ] = None


DEFAULT_OUTPUT: Final = OutputOptions()


@attrs.frozen(kw_only=True)
class Places:
    """Where the results of a run go.

    Attributes:
        output: The file, or ``-``.
        output_format: Its format.
        streamed: Whether records go there as they come.
        ledger: The file of the ledger; ``None``: none is kept.
        report: The file of the report, if one is wanted.
        summary: The file of the summary, if one is wanted.
        shared: The URL of the ledger that other machines share, if any.
    """

    output: str
    output_format: ExportFormat
    streamed: bool
    ledger: Path | None
    report: Path | None
    summary: Path | None = None
    shared: str | None = None


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write the counts of a run as JSON.

    Raises:
        CommandError: It cannot be written.
    """
    try:
        with open_replacement(path) as stream:
            stream.write(dump_record(summary))
    except OSError as error:
        raise _explain(str(path), error) from None


def plan_places(
    options: OutputOptions, *, inputs: Sequence[Path | str] = (), needs_ledger: bool = False
) -> Places:
    """Decide where the results of a run go, and check in advance that they can be written.

    Raises:
        CommandError: They cannot be written, or the options do not fit together.
    """
    output, report = options.output, options.report
    shared = options.ledger if options.ledger and is_shared(options.ledger) else None
    ledger = None if shared or options.ledger is None else Path(options.ledger)
    streamed = is_stream(output)
    if streamed:
        if options.output_format not in {None, "jsonl"}:
            raise CommandError(
                "What is streamed is JSON Lines; name a file with --output for another --format."
            )
        if ledger is None and (needs_ledger or report is not None):
            option = "--key-column" if needs_ledger else "--report"
            raise CommandError(
                f"{option} goes by the ledger, and a streamed output has none: add --ledger."
            )
    else:
        ledger = Path(f"{output}{LEDGER_SUFFIX}") if ledger is None else ledger
    outputs: list[tuple[str, str | Path]] = [("--output", output)]
    if report is not None:
        outputs.append(("--report", report))
    if options.summary is not None:
        outputs.append(("--summary-json", options.summary))
    for option, name in outputs:
        check_output(option, str(name))
    if ledger is not None:
        ledger = Path(os.path.realpath(ledger)) if ledger.is_symlink() else ledger
        check_ledger(ledger)
    check_conflicts([("--input", name) for name in inputs], outputs, ledger=ledger)
    chosen = options.output_format or ("jsonl" if streamed else detect_output_format(output))
    check_extra(chosen == "parquet", "pyarrow", "parquet", "Parquet")
    check_extra(report is not None, "jinja2", "report", "The report")
    if shared is not None:
        if ledger is None:
            raise CommandError(
                "A ledger in Redis needs a file for --output; the run resumes by it."
            )
        build_shared_ledger(shared)
    return Places(
        shared=shared,
        output=output,
        output_format=chosen,
        streamed=streamed,
        ledger=ledger,
        report=report,
        summary=options.summary,
    )


@attrs.define(eq=False)
class LedgerExport:
    """Writes and counts the contents of a ledger.

    Attributes:
        ledger: The ledger, which is only read.
        choose: Whether an item is written and counted.
        statistics: The counts of the last write.
        unanswered: The number of items without an outcome, and so without a record.
        counted: Whether both are of the whole ledger.
    """

    ledger: SQLiteLedger | SharedItems
    choose: Callable[[LedgerItem], bool] = lambda _: True
    counted: bool = attrs.field(default=False, init=False)
    statistics: Statistics = attrs.field(factory=Statistics, init=False)
    unanswered: int = attrs.field(default=0, init=False)
    _halted: bool = attrs.field(default=False, init=False)

    def halt(self) -> None:
        """Abort the writing. The earlier file stays. Thread-safe."""
        self._halted = True

    def iter_records(self) -> Iterator[dict[str, Any]]:
        """Yield the record of each item that has its outcome, in order.

        Raises:
            LedgerError: The ledger cannot be read.
        """
        self.statistics, self.unanswered, self.counted = Statistics(), 0, False
        with closing(self.ledger.iter_items()) as items:  # type: ignore[type-var]
            for item in items:
                if self._halted:
                    raise HaltedError
                if not self.choose(item):
                    continue
                if not item.done:
                    self.unanswered += 1
                    continue
                record = build_ledger_record(item)
                self.statistics.add(record)
                yield record
        self.counted = True

    async def write(self, places: Places, *, source: str) -> str:
        """Write the results, and the report if one is wanted. Return where they are.

        Streamed results are only counted.

        Args:
            places: Where they go.
            source: The name of the input, for the report.

        Raises:
            CommandError: They cannot be written, or `halt` was called.
            LedgerError: The ledger cannot be read.
        """
        writing = asyncio.create_task(asyncio.to_thread(self._write, places, source))
        try:
            return await asyncio.shield(writing)
        except asyncio.CancelledError:
            self.halt()
            await asyncio.wait({writing})
            raise

    def _write(self, places: Places, source: str) -> str:
        place, shown = places.output, "standard output"
        try:
            if places.streamed:
                deque(self.iter_records(), maxlen=0)
            else:
                self._export(places)
                shown = place
            if places.report is not None:
                place = str(places.report)
                lines = map(dump_record, self.iter_records())
                write_report(lines, places.report, source=source)
        except HaltedError:
            raise self._explain(f"The writing of {place} was interrupted", 130) from None
        except OSError as error:
            deque(self.iter_records(), maxlen=0)  # its counts are still reported
            sentence = f"{place} could not be written: {error.strerror or error}"
            raise self._explain(sentence, ExitCode.STOPPED) from None
        return f"{shown} (ledger: {self.ledger.path})"

    def _export(self, places: Places) -> None:
        own = self.find_columns(places.output_format)
        export_results(self.iter_records(), places.output, places.output_format, own=own)

    def find_columns(self, output_format: ExportFormat) -> OwnColumns:
        """Return the columns of the input for a table.

        Raises:
            LedgerError: The ledger cannot be read.
        """
        if output_format == "jsonl":
            return NO_COLUMNS
        with closing(self.ledger.iter_columns()) as rows:  # type: ignore[type-var]
            return find_own_columns(rows)

    def _explain(self, sentence: str, exit_code: int) -> CommandError:
        return CommandError(
            f"{sentence}. What was answered is kept in the ledger: cloudinary-analyze export "
            f"{self.ledger.path} -o FILE",
            exit_code=ExitCode(exit_code),
        )


@attrs.define(eq=False)
class StreamResults:
    """Writes records to standard output, a pipe or a device as they arrive.

    Attributes:
        output: The file to open. ``-`` is standard output, which is already open.
    """

    output: str
    _descriptor: int = attrs.field(default=-1, init=False)
    _outlet: Outlet = attrs.field(init=False)

    @property
    def place(self) -> str:
        """The place of the results, for messages."""
        return "standard output" if self.output == STANDARD else self.output

    def __enter__(self) -> Self:
        if self.output == STANDARD:
            self._descriptor = sys.stdout.fileno()
        else:
            try:
                self._descriptor = os.open(self.output, os.O_WRONLY)
            except OSError as error:
                raise CommandError(
                    f"The output {self.output} cannot be written: {error.strerror}."
                ) from None
        self._outlet = Outlet(self._descriptor)
        return self

    async def write(self, line: bytes) -> None:
        """Write a record. A slow reader of a pipe slows the run down.

        Raises:
            CommandError: It cannot be written.
        """
        if os.isatty(self._descriptor):
            line = escape_controls(line.decode()).encode()
        try:
            await self._outlet.write(line)
        except OSError as error:
            sentence = explain_stdout(error)
            if self.output != STANDARD:
                sentence = sentence.replace("Standard output", f"The output {self.output}")
            raise CommandError(
                f"{sentence} No further items were sent.", exit_code=ExitCode.STOPPED
            ) from None

    def __exit__(self, *_: object) -> None:
        self._outlet.close()
        if self.output != STANDARD:
            os.close(self._descriptor)


def check_is_ledger(path: Path) -> None:
    """Check in advance that a ledger was named, and not the output next to it.

    Raises:
        CommandError: The output was named.
    """
    if os.path.isdir(path):  # noqa: PTH112 -- never raises
        raise CommandError(f"{path} is a directory, not a ledger. Pass the file OUTPUT.ledger.")
    ledger = Path(f"{path}{LEDGER_SUFFIX}")
    if not is_database(path) and is_database(ledger):
        there = os.path.exists(path)  # noqa: PTH110 -- never raises
        what = f"{path} is the output of a run" if there else f"{path} does not exist"
        raise CommandError(f"{what}. The ledger of that run is {ledger}; pass that instead.")


def export_ledger(
    ledger: str,
    output: str,
    output_format: ExportFormat,
    console: Console,
    *,
    status: Literal["ok", "error"] | None = None,
    models: Sequence[str] = (),
) -> ExitCode:
    """Write the contents of a ledger, also during a run.

    Args:
        ledger: The ledger: a file, or the URL of a Redis.
        output: The file, or ``-``.
        output_format: Its format.
        console: For messages.
        status: Write only answered or only failed items.
        models: Write only the items of these models. Empty: all models.

    Raises:
        CommandError: It cannot be written.
        LedgerError: The ledger cannot be read.
    """
    if not is_shared(ledger):
        check_is_ledger(Path(ledger))
    wanted = frozenset(map(read_model_name, models))
    export = LedgerExport(
        SharedItems(ledger) if is_shared(ledger) else SQLiteLedger(ledger),
        lambda item: (
            (not wanted or item.model in wanted)
            and (status is None or (item.response is not None) == (status == "ok"))
        ),
    )
    records = export.iter_records()
    try:
        own = export.find_columns(output_format)
        if output == STANDARD:
            write_records(records, sys.stdout.buffer, output_format, own=own)
            sys.stdout.buffer.flush()
        else:
            export_results(records, output, output_format, own=own)
    except OSError as error:
        raise _explain(output, error) from None
    statistics = export.statistics
    if wanted and not statistics.total:
        known = sorted({item.model for item in export.ledger.iter_items() if item.model})
        say(console, f"The ledger has no results of that kind; its models: {', '.join(known)}.")
    place = "standard output" if output == STANDARD else output
    sentence = f"{statistics.total:,} items in {place}: {statistics.ok:,} ok, "
    sentence += f"{statistics.failed:,} failed"
    if export.unanswered:
        sentence += f"; {export.unanswered:,} more have no outcome yet"
    say(console, f"{sentence}.")
    return ExitCode.DONE


def report_results(
    results: Path, output: str, console: Console, *, title: str = DEFAULT_TITLE
) -> ExitCode:
    """Write the report of a run from its results in JSON Lines, or from its ledger.

    Raises:
        CommandError: The results cannot be read, or the report cannot be written.
        LedgerError: The ledger cannot be read.
    """
    if is_database(results):
        records = LedgerExport(SQLiteLedger(results)).iter_records()
        return _write(map(dump_record, records), results, output, console, title)
    try:
        with results.open("rb") as stream:
            return _write(stream, results, output, console, title)
    except OSError as error:
        raise CommandError(f"{results} cannot be read: {error.strerror}.") from None


def _write(
    lines: Iterable[bytes], results: Path, output: str, console: Console, title: str
) -> ExitCode:
    nothing = CommandError(
        f"{results} holds no record of a run, so {output} was not written. Name the results in "
        "JSON Lines, or the ledger of the run."
    )
    lines = iter(lines)
    first = next(lines, None)
    if first is None:
        raise nothing
    try:
        written = write_report(chain((first,), lines), output, title=title, source=str(results))
    except OSError as error:
        raise _explain(output, error) from None
    except ConfigurationError:
        raise nothing from None
    say(console, f"{written.results:,} results, {written.pictures:,} pictures in {output}.")
    if written.bad_lines:
        say(console, f"{written.bad_lines:,} lines were no record and left out.", style="yellow")
    return ExitCode.DONE


def _explain(output: str, error: OSError) -> CommandError:
    if output == STANDARD:
        return CommandError(explain_stdout(error), exit_code=ExitCode.STOPPED)
    kept = "" if is_stream(output) else " What was there before is kept."
    return CommandError(
        f"{output} cannot be written: {error.strerror}.{kept}", exit_code=ExitCode.STOPPED
    )
