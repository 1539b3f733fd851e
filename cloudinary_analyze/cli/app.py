"""The commands and their options. Reads the command line into plans, and performs nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console

from cloudinary_analyze._version import __version__
from cloudinary_analyze.cli.feed import open_source
from cloudinary_analyze.cli.input import InputFormat, read_source
from cloudinary_analyze.cli.models import Parameters, choose_models, print_models
from cloudinary_analyze.cli.notifications import WAYS, ListenPlan, perform_listen, plan_receiving
from cloudinary_analyze.cli.output import (
    check_extra,
    check_place,
    detect_output_format,
    export_ledger,
    is_stream,
    plan_places,
    report_results,
)
from cloudinary_analyze.cli.run import RunPlan, perform_run
from cloudinary_analyze.cli.screen import CommandError, ExitCode, build_console, say
from cloudinary_analyze.cli.service import EmulatorPlan, read_latency, read_quotas, serve
from cloudinary_analyze.cli.single import SinglePlan, perform_analyze, perform_status
from cloudinary_analyze.errors import AnalyzeError
from cloudinary_analyze.results.export import ExportFormat

DEFAULT_SAMPLES: Final = 300
EXIT_CODES: Final = """Exit codes:

- 0: every item was answered
- 1: some items failed; the results say which and why
- 2: the command line, the configuration or the input cannot be right; nothing was sent
- 3: stopped early: refused credentials, an exhausted quota, nowhere to write the results
- 130: interrupted by Ctrl-C or SIGTERM
"""
RUN_HELP: Final = f"""Analyse many images with one model or several, and write a record for each.

What is asked and answered is kept in a ledger beside the output, OUTPUT.ledger. However a run
ends, the same command goes on where it was: what is answered is not asked again, and tasks that
were submitted are taken up again. OUTPUT is written from the ledger when the run ends, also after
Ctrl-C: every item once, in the order of the input. With --output - records are streamed as they
come, and there is no ledger unless --ledger names one.

Bad lines are reported and do not stop the rest. The first Ctrl-C finishes what is in flight, the
second aborts. The ledger holds source URLs in clear.

With --mode task the images are analysed as tasks, whose results come in by {WAYS}.
Whichever it is, a result is acknowledged only once the ledger holds it.

{EXIT_CODES}"""

app: App = App(
    name="cloudinary-analyze",
    help=f"Analyse images with Cloudinary's Analyze API.\n\n{EXIT_CODES}",
    help_format="markdown",
    version=__version__,
    version_format="plaintext",
    # without them each flag and list would get a --no-… or --empty-… of its own
    default_parameter=Parameter(negative=()),
)

Prompts = Annotated[
    list[str] | None,
    Parameter(name="--prompt", help="A prompt for ai_vision_general; up to 10 times."),
]
Questions = Annotated[
    list[str] | None,
    Parameter(
        name="--question",
        help="A yes/no question for ai_vision_moderation; up to 10 times.",
    ),
]
Tags = Annotated[
    list[str] | None,
    Parameter(
        name="--tag", help="name=description of a tag for ai_vision_tagging; up to 10 times."
    ),
]
Emulated = Annotated[
    bool,
    Parameter(
        name="--emulator",
        help="Call an emulator inside of this process; needs no account and costs nothing.",
    ),
]


@app.command(help=RUN_HELP)
def run(
    *models: Annotated[str, Parameter(help="Models, see `cloudinary-analyze models`.")],
    source: Annotated[
        str | None,
        Parameter(
            name="--input",
            help="A file with one URL or asset:ID per line, or CSV or JSON Lines; - is stdin.",
            allow_leading_hyphen=True,
        ),
    ] = None,
    output: Annotated[
        str,
        Parameter(
            name="--output",
            help="Where the results go; - is stdout, as JSON Lines.",
            allow_leading_hyphen=True,
        ),
    ] = "results.jsonl",
    output_format: Annotated[
        ExportFormat | None,
        Parameter(
            name="--format",
            help="The output's format. Default: by its extension, else JSON Lines.",
        ),
    ] = None,
    input_format: Annotated[
        InputFormat | None,
        Parameter(name="--input-format", help="The input's format. Default: by its extension."),
    ] = None,
    column: Annotated[
        str | None,
        Parameter(
            name="--column",
            help="The column or field of the sources. Default: url, uri or source.",
        ),
    ] = None,
    key_column: Annotated[
        str | None,
        Parameter(
            name="--key-column",
            help="The column or field that names each image for good, for URLs that change, "
            "being signed: an image is known by it, and not by its URL.",
        ),
    ] = None,
    prompts: Prompts = None,
    questions: Questions = None,
    tags: Tags = None,
    permits: Annotated[
        int, Parameter(name="--permits", help="Calls in flight at once, at the most.")
    ] = 64,
    limit: Annotated[
        int | None, Parameter(name="--limit", help="Take the first so many lines only.")
    ] = None,
    ledger: Annotated[
        Path | None,
        Parameter(name="--ledger", help="The ledger's file. Default: OUTPUT.ledger."),
    ] = None,
    retry_failed: Annotated[
        bool,
        Parameter(
            name="--retry-failed",
            help="Ask again what failed for good, too; of tasks also those whose result was never "
            "delivered, as calls, which are charged once more.",
        ),
    ] = False,
    report: Annotated[
        Path | None,
        Parameter(name="--report", help="Write an HTML report of the results here, too."),
    ] = None,
    mode: Annotated[
        Literal["call", "task"],
        Parameter(name="--mode", help="Make calls, or submit tasks."),
    ] = "call",
    receive: Annotated[
        str | None,
        Parameter(
            name="--receive",
            help="With --mode task: HOST:PORT to take the webhooks in at; at any path.",
        ),
    ] = None,
    public_url: Annotated[
        str | None,
        Parameter(
            name="--public-url",
            help="The URL that leads to --receive, or to the receiver that fills --redis.",
        ),
    ] = None,
    redis: Annotated[
        str | None,
        Parameter(
            name="--redis",
            help="With --mode task: the Redis that a receiver, such as `listen`, fills.",
        ),
    ] = None,
    emulated: Emulated = False,
    samples: Annotated[
        int | None,
        Parameter(
            name="--samples",
            help=f"With --emulator, instead of --input: how many pictures of its gallery. "
            f"Default: {DEFAULT_SAMPLES}.",
        ),
    ] = None,
) -> ExitCode:
    """Read the options of `run` into a plan, and perform it."""
    builders = choose_models(models, _gather(prompts, questions, tags))
    _check_count("--permits", permits)
    _check_count("--limit", limit)
    _check_count("--samples", samples)
    if source is not None and samples is not None:
        raise CommandError("--samples takes the place of --input; pass one of them.")
    if samples is not None and not emulated:
        raise CommandError("--samples are pictures of the emulator; add --emulator.")
    if source is None and not emulated:
        raise CommandError(
            "There is nothing to analyse: pass --input with a file, or - for standard input. "
            "To try it without an account and an input, pass --emulator instead."
        )
    if source is None and not (input_format is column is key_column is None):
        raise CommandError(
            "--input-format, --column and --key-column describe an --input, and there is none."
        )
    places = plan_places(
        output, output_format, ledger=ledger, report=report, needs_ledger=key_column is not None
    )
    if retry_failed and places.ledger is None:
        raise CommandError("--retry-failed goes by the ledger, and there is none: add --ledger.")
    receiving = plan_receiving(
        mode, receive=receive, public_url=public_url, redis=redis, emulated=emulated
    )
    plan = RunPlan(
        models=builders,
        source=None
        if source is None
        else open_source(source, input_format=input_format, column=column, key_column=key_column),
        samples=DEFAULT_SAMPLES if samples is None else samples,
        places=places,
        named=key_column is not None,
        retry_failed=retry_failed,
        receiving=receiving,
        permits=permits,
        limit=limit,
        emulated=emulated,
    )
    return _perform(perform_run(plan, build_console()))


@app.command
def analyze(
    model: Annotated[str, Parameter(help="A model, see `cloudinary-analyze models`.")],
    source: Annotated[str, Parameter(help="An http(s) URL, or asset:ID.")],
    /,
    *,
    prompts: Prompts = None,
    questions: Questions = None,
    tags: Tags = None,
    emulated: Emulated = False,
) -> ExitCode:
    """Analyse one image and show the answer: for reading on a terminal, else JSON as received."""
    builders = choose_models([model], _gather(prompts, questions, tags))
    build = next(iter(builders.values()))
    plan = SinglePlan(build=build, source=read_source(source), emulated=emulated)
    return _perform(perform_analyze(plan, build_console()))


@app.command
def status(task_id: Annotated[str, Parameter(help="The task's id.")], /) -> ExitCode:
    """Ask for the status of a task: for reading on a terminal, else JSON as received."""
    return _perform(perform_status(task_id, build_console()))


@app.command
def listen(
    *,
    host: Annotated[str, Parameter(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Parameter(help="The port to listen on; 0 takes a free one.")] = 8080,
    path: Annotated[str, Parameter(help="The path to take notifications at.")] = "/",
    redis: Annotated[
        str | None, Parameter(help="Put them into this Redis, too, which feeds all workers.")
    ] = None,
) -> ExitCode:
    """Receive notifications and show those that are verified, until Ctrl-C.

    They are shown for reading on a terminal, else as JSON Lines; what is refused is told on stderr.
    With --redis they are also stored there, before the sender gets its response.
    """
    if not path.startswith("/"):
        raise CommandError(f"--path begins with a slash; {path!r} does not.")
    plan = ListenPlan(host=host, port=port, path=path, redis=redis)
    return _perform(perform_listen(plan, build_console()))


@app.command
def export(
    ledger: Annotated[Path, Parameter(help="The ledger of a run.")],
    /,
    *,
    output: Annotated[
        str,
        Parameter(
            name=["--output", "-o"], help="The file; - is stdout.", allow_leading_hyphen=True
        ),
    ],
    output_format: Annotated[
        ExportFormat | None,
        Parameter(name="--format", help="Its format. Default: by its extension, else JSON Lines."),
    ] = None,
) -> ExitCode:
    """Write what a ledger holds as JSON Lines, CSV or Parquet, while a run goes on or not."""
    chosen = output_format or detect_output_format(output)
    check_extra(chosen == "parquet", "pyarrow", "parquet", "Parquet")
    if not is_stream(output):
        check_place("--output", output)
    return export_ledger(ledger, output, chosen, build_console())


@app.command
def report(
    results: Annotated[Path, Parameter(help="Results in JSON Lines, or the ledger of a run.")],
    /,
    *,
    output: Annotated[
        str, Parameter(name=["--output", "-o"], help="The HTML file.")
    ] = "report.html",
) -> ExitCode:
    """Write a page of the results: the pictures, what was found on them, and the numbers."""
    check_extra(True, "jinja2", "report", "The report")
    if not is_stream(output):
        check_place("--output", output)
    return report_results(results, output, build_console())


@app.command
def models() -> ExitCode:
    """List the models, the quota that each uses, and the option that it needs."""
    print_models()
    return ExitCode.DONE


@app.command
def emulator(
    *,
    host: Annotated[str, Parameter(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, Parameter(help="The port to listen on; 0 takes a free one.")] = 0,
    latency: Annotated[
        str | None,
        Parameter(help="Seconds that an analysis takes, or `realistic`. Default: none."),
    ] = None,
    quotas: Annotated[
        list[str] | None,
        Parameter(
            name="--quota",
            help="feature=units of a quota that runs down, such as ai_vision=5000; repeatable.",
        ),
    ] = None,
) -> ExitCode:
    """Run the emulator of the Analyze API until Ctrl-C, and print the CLOUDINARY_URL for it."""
    plan = EmulatorPlan(
        host=host, port=port, latency=read_latency(latency), quotas=read_quotas(quotas or ())
    )
    return _perform(serve(plan, build_console()))


def run_app(arguments: Sequence[str]) -> int:
    """Run the command that the arguments name, and return the exit code."""
    console = build_console()
    try:
        result = app(
            list(arguments),
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
    except KeyboardInterrupt:
        return _fail(console, "Interrupted.", ExitCode.INTERRUPTED)
    except CycloptsError as error:
        return _fail(console, f"{error} See --help.", ExitCode.USAGE)
    except CommandError as error:
        return _fail(console, str(error), error.exit_code)
    except AnalyzeError as error:
        return _fail(console, str(error), ExitCode.USAGE)
    return int(result) if isinstance(result, ExitCode) else ExitCode.DONE


def _fail(console: Console, sentence: str, exit_code: ExitCode) -> int:
    say(console, sentence, style="red")
    return int(exit_code)


def _perform(work: Coroutine[Any, Any, ExitCode]) -> ExitCode:
    return asyncio.run(work)


def _gather(
    prompts: list[str] | None, questions: list[str] | None, tags: list[str] | None
) -> Parameters:
    return Parameters(
        prompts=tuple(prompts or ()), questions=tuple(questions or ()), tags=tuple(tags or ())
    )


def _check_count(option: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise CommandError(f"{option} must be a whole number from 1, not {value}.")
