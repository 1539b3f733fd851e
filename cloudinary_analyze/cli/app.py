"""The commands. Reads the command line into plans; the other modules perform them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from cyclopts import App, CycloptsError, Parameter, validators
from rich.console import Console

from cloudinary_analyze._version import __version__
from cloudinary_analyze.cli.feed import NO_INPUT, InputOptions, check_rows, open_source
from cloudinary_analyze.cli.files import check_conflicts, check_output
from cloudinary_analyze.cli.models import NO_PARAMETERS, Parameters, choose_models, print_models
from cloudinary_analyze.cli.money import NO_LIMITS, SpendingOptions, perform_dry_run
from cloudinary_analyze.cli.notifications import (
    CALLS,
    WAYS,
    ListenPlan,
    ReceivingOptions,
    perform_listen,
)
from cloudinary_analyze.cli.outlet import flush_stdout, protect_standard_streams
from cloudinary_analyze.cli.output import (
    DEFAULT_OUTPUT,
    ExportFormatOption,
    OutputOptions,
    check_extra,
    detect_output_format,
    export_ledger,
    plan_places,
    report_results,
)
from cloudinary_analyze.cli.plan import RunPlan
from cloudinary_analyze.cli.run import perform_run
from cloudinary_analyze.cli.screen import (
    DEFAULT_DISPLAY,
    CommandError,
    DisplayOptions,
    ExitCode,
    build_console,
    explain_stdout,
    finish_messages,
    say,
    wants_json,
)
from cloudinary_analyze.cli.service import (
    DEFAULT_CALLS,
    HIGHEST_PORT,
    CallOptions,
    EmulatorPlan,
    ProxyOption,
    check_host,
    read_latency,
    read_quotas,
    serve,
)
from cloudinary_analyze.cli.shared import is_shared, shard_source
from cloudinary_analyze.cli.single import SinglePlan, perform_analyze, perform_status
from cloudinary_analyze.cli.text import read_source
from cloudinary_analyze.errors import AnalyzeError
from cloudinary_analyze.results.report import DEFAULT_TITLE

DEFAULT_SAMPLES: Final = 300
EXIT_CODES: Final = """Exit codes:

- 0: every item was answered
- 1: some items failed; the results say which and why
- 2: invalid command line, configuration or input; nothing was sent
- 3: stopped early: refused credentials, an exhausted quota, or results that cannot be written
- 130: interrupted by Ctrl-C or SIGTERM
"""
RUN_HELP: Final = f"""Analyze many images with one or more models, and write a record for each.

Every response is recorded in a ledger next to the output, OUTPUT.ledger. Run the same command
again to resume. Completed items are skipped and submitted tasks are picked up. OUTPUT is written
from the ledger when the run ends, also after Ctrl-C: every item once, in the order of the input.
With --output - records are streamed as they arrive, and there is no ledger unless you pass
--ledger.

Invalid lines are reported and do not stop the rest. The first Ctrl-C finishes the attempts in flight,
and sends nothing more. The second aborts. The ledger contains source URLs in full.

With --mode task the images are analyzed as tasks, whose results arrive through {WAYS}.
A result is acknowledged only once the ledger holds it.

{EXIT_CODES}"""

app: App = App(
    name="cloudinary-analyze",
    help=f"Analyze images with Cloudinary's Analyze API.\n\n{EXIT_CODES}",
    help_format="markdown",
    version=__version__,
    version_format="plaintext",
    # without this each flag and list gets a --no-… or --empty-… option
    default_parameter=Parameter(negative=()),
)

Emulated = Annotated[
    bool,
    Parameter(
        name="--emulator",
        help="Call an emulator inside this process; it needs no account and costs nothing.",
    ),
]
Work = Callable[[Console], "ExitCode | Coroutine[Any, Any, ExitCode]"]
"""The work of a command, once its options are read."""

Host = Annotated[str, Parameter(help="Address to listen on.", validator=check_host)]
Port = Annotated[
    int,
    Parameter(
        help="Port to listen on; 0 takes a free one.",
        validator=validators.Number(gte=0, lte=HIGHEST_PORT),
    ),
]


@app.command(help=RUN_HELP)
def run(
    *models: Annotated[str, Parameter(help="Models, see `cloudinary-analyze models`.")],
    source: InputOptions = NO_INPUT,
    results: OutputOptions = DEFAULT_OUTPUT,
    parameters: Parameters = NO_PARAMETERS,
    receiving: ReceivingOptions = CALLS,
    calling: CallOptions = DEFAULT_CALLS,
    spending: SpendingOptions = NO_LIMITS,
    display: DisplayOptions = DEFAULT_DISPLAY,
    retry_failed: Annotated[
        bool,
        Parameter(
            name="--retry-failed",
            help="Also retry items that failed permanently. Tasks whose results were never "
            "delivered are retried as calls and charged again.",
        ),
    ] = False,
    emulated: Emulated = False,
    samples: Annotated[
        int | None,
        Parameter(
            name="--samples",
            help="With --emulator, instead of --input: the number of pictures of its gallery. "
            f"Default: {DEFAULT_SAMPLES}.",
            validator=validators.Number(gte=1),
        ),
    ] = None,
) -> Work:
    """Read the options of `run` into a plan, and perform it."""
    builders = choose_models(models, parameters)
    _check_input(source, emulated=emulated, samples=samples)
    named = source.key_column is not None
    lines = open_source(source) if source.names else None
    if source.shard is not None and lines is not None:
        lines = shard_source(lines, source.shard)
    places = plan_places(results, inputs=() if lines is None else lines.files, needs_ledger=named)
    if lines is not None and lines.repeatable:
        check_rows(lines)
    if retry_failed and places.ledger is None:
        raise CommandError("--retry-failed needs a ledger; add --ledger.")
    if places.shared is not None and (retry_failed or emulated):
        option = "--retry-failed" if retry_failed else "--emulator"
        raise CommandError(f"{option} does not work with a ledger that other machines share.")
    receiving.check(emulated=emulated)
    spending.check(builders, streamed=places.ledger is None)
    plan = RunPlan(
        models=builders,
        source=lines,
        samples=DEFAULT_SAMPLES if samples is None else samples,
        places=places,
        named=named,
        retry_failed=retry_failed,
        receiving=receiving,
        calling=calling,
        spending=spending,
        display=display,
        limit=source.limit,
        emulated=emulated,
    )
    perform = perform_dry_run if spending.dry_run else perform_run
    return lambda console: perform(plan, display.adapt(console))


def _check_input(source: InputOptions, *, emulated: bool, samples: int | None) -> None:
    if samples is not None and source.names:
        raise CommandError("--samples replaces --input; pass one of them.")
    if samples is not None and not emulated:
        raise CommandError("--samples are pictures of the emulator; add --emulator.")
    if not source.names and not emulated:
        raise CommandError(
            "Missing input: pass --input with a file, or - for standard input. "
            "To try it without an account and an input, pass --emulator instead."
        )
    if not source.names and (source.input_format or source.column_options or source.shard):
        raise CommandError(
            "--input-format, --column, --key-column, --keep and --shard describe an input; add "
            "--input."
        )


@app.command
def analyze(
    model: Annotated[str, Parameter(help="Model, see `cloudinary-analyze models`.")],
    source: Annotated[str, Parameter(help="An http(s) URL, or asset:ID.")],
    /,
    *,
    parameters: Parameters = NO_PARAMETERS,
    emulated: Emulated = False,
    proxy: ProxyOption = None,
) -> Work:
    """Analyze one image. Prints a summary on a terminal, otherwise the JSON as received."""
    build = next(iter(choose_models([model], parameters).values()))
    plan = SinglePlan(build=build, source=read_source(source), emulated=emulated, proxy=proxy)
    return partial(perform_analyze, plan)


@app.command
def status(
    task_id: Annotated[str, Parameter(help="The task's id.")], /, *, proxy: ProxyOption = None
) -> Work:
    """Show the status of a task. Prints a summary on a terminal, otherwise the JSON as received."""
    if not task_id.strip():
        raise CommandError("The task id is empty. Pass the id that the submission returned.")
    return partial(perform_status, task_id, proxy)


@app.command
def listen(
    *,
    host: Host = "127.0.0.1",
    port: Port = 8080,
    path: Annotated[str, Parameter(help="Path to receive notifications at.")] = "/",
    redis: Annotated[
        str | None,
        Parameter(
            help="URL of a Redis to store them in, which feeds all workers. Its password comes from "
            "REDIS_URL."
        ),
    ] = None,
) -> Work:
    """Receive notifications and print those that are verified, until Ctrl-C.

    Prints a summary on a terminal, otherwise JSON Lines; refusals are reported on stderr.
    With --redis they are also stored there, before the sender gets its response.
    """
    if not path.startswith("/"):
        raise CommandError(f"--path must begin with a slash, not {path!r}.")
    plan = ListenPlan(host=host, port=port, path=path, redis=redis)
    return partial(perform_listen, plan)


@app.command
def export(
    ledger: Annotated[
        str, Parameter(help="The ledger of a run, or redis://HOST/0 for all machines.")
    ],
    /,
    *,
    output: Annotated[
        str,
        Parameter(
            name=["--output", "-o"], help="The file; - is stdout.", allow_leading_hyphen=True
        ),
    ],
    output_format: ExportFormatOption = None,
    status: Annotated[
        Literal["ok", "error"] | None,
        Parameter(name="--status", help="Write only answered items (ok) or only failures (error)."),
    ] = None,
    models: Annotated[
        tuple[str, ...],
        Parameter(
            name="--model", help="Write only items of this model; repeatable.", show_default=False
        ),
    ] = (),
) -> Work:
    """Write the contents of a ledger as JSON Lines, CSV or Parquet, also during a run.

    The ledger may be one of `run` or one that a program filled with `session.map`.
    """
    _check_output(output, None if is_shared(ledger) else Path(ledger))
    chosen = output_format or detect_output_format(output)
    check_extra(chosen == "parquet", "pyarrow", "parquet", "Parquet")
    return partial(export_ledger, ledger, output, chosen, status=status, models=models)


@app.command
def report(
    results: Annotated[Path, Parameter(help="Results in JSON Lines, or the ledger of a run.")],
    /,
    *,
    output: Annotated[
        str, Parameter(name=["--output", "-o"], help="The HTML file.")
    ] = "report.html",
    title: Annotated[str, Parameter(name="--title", help="Heading of the page.")] = DEFAULT_TITLE,
) -> Work:
    """Write an HTML page of the results: the pictures, what was found on them, and the numbers."""
    check_extra(True, "jinja2", "report", "The report")
    _check_output(output, results)
    return partial(report_results, results, output, title=title)


def _check_output(output: str, source: Path | None) -> None:
    if source is not None:
        check_conflicts([(f"the file {source}", source)], [("--output", output)])
    check_output("--output", output)


@app.command
def models() -> Work:
    """List the models, the quota that each uses, and the option that it needs."""
    return print_models


@app.command
def emulator(
    *,
    host: Host = "127.0.0.1",
    port: Port = 0,
    latency: Annotated[
        str | None,
        Parameter(help="Seconds that an analysis takes, or `realistic`. Default: none."),
    ] = None,
    quotas: Annotated[
        tuple[str, ...],
        Parameter(
            name="--quota",
            help="feature=units of a quota that runs down, such as ai_vision=5000; repeatable.",
            show_default=False,
        ),
    ] = (),
) -> Work:
    """Run the emulator of the Analyze API until Ctrl-C, and print the CLOUDINARY_URL for it."""
    plan = EmulatorPlan(
        host=host, port=port, latency=read_latency(latency), quotas=read_quotas(quotas)
    )
    return partial(serve, plan)


def run_app(arguments: Sequence[str]) -> int:
    """Run the command of the arguments, and return its exit code."""
    protect_standard_streams()
    console = build_console()
    console.as_json = wants_json(arguments)  # also for errors of the command line itself
    try:
        exit_code = _run(arguments, console)
        if (failure := flush_stdout()) is not None and exit_code != ExitCode.STOPPED:
            exit_code = _fail(console, explain_stdout(failure), ExitCode.STOPPED)
        return int(exit_code)
    finally:
        finish_messages(console)


def _run(arguments: Sequence[str], console: Console) -> ExitCode:
    try:
        work = _read(arguments)
        if work is None:  # --help or --version
            return ExitCode.DONE
        result = work(console)
        return result if isinstance(result, ExitCode) else asyncio.run(result)
    except KeyboardInterrupt:
        return _fail(console, "Interrupted.", ExitCode.INTERRUPTED)
    except CycloptsError as error:
        return _fail(console, f"{error} See --help.", ExitCode.USAGE)
    except CommandError as error:
        return _fail(console, str(error), error.exit_code)
    except AnalyzeError as error:
        return _fail(console, str(error), ExitCode.USAGE)


def _read(arguments: Sequence[str]) -> Work | None:
    """Parse a command line. Return the work to do, or ``None`` if it is already done.

    Raises:
        CycloptsError: It is invalid.
        CommandError: Its options do not fit together, or a file cannot be examined.
        AnalyzeError: A value is invalid.
    """
    try:
        work: Work | None = app(
            list(arguments),
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
    except OSError as error:
        if error.filename is None:  # the help could not be printed
            raise CommandError(explain_stdout(error), exit_code=ExitCode.STOPPED) from None
        raise CommandError(f"{error.filename}: {error.strerror}.") from None
    return work


def _fail(console: Console, sentence: str, exit_code: ExitCode) -> ExitCode:
    say(console, sentence, style="red")
    return exit_code
