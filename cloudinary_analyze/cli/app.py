"""The commands and their options. Reads the command line into plans, and performs nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Annotated, Any, Final

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console

from cloudinary_analyze._version import __version__
from cloudinary_analyze.bulk.input import InputFormat, read_source
from cloudinary_analyze.cli.choices import Parameters, choose_models
from cloudinary_analyze.cli.console import CommandError, ExitCode, build_console, say
from cloudinary_analyze.cli.emulate import EmulatorPlan, read_latency, read_quotas, serve
from cloudinary_analyze.cli.listing import print_models
from cloudinary_analyze.cli.run import RunPlan, perform_run
from cloudinary_analyze.cli.single import SinglePlan, perform_analyze
from cloudinary_analyze.cli.sources import open_source
from cloudinary_analyze.errors import AnalyzeError

DEFAULT_SAMPLES: Final = 300
EXIT_CODES: Final = """Exit codes:

- 0: every item was answered
- 1: some items failed; the results say which and why
- 2: the command line, the configuration or the input cannot be right; nothing was sent
- 3: stopped early: refused credentials, an exhausted quota, nowhere to write the results
- 130: interrupted by Ctrl-C or SIGTERM
"""
RUN_HELP: Final = f"""Analyse many images with one model or several, and write a record for each.

Records are written as they come, to OUTPUT.part, which becomes OUTPUT at the end, also after
Ctrl-C. Bad lines are reported and do not stop the rest. The first Ctrl-C finishes what is in
flight, the second aborts.

{EXIT_CODES}"""

app = App(
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
            help="Where the results go, as JSON Lines; - is stdout.",
            allow_leading_hyphen=True,
        ),
    ] = "results.jsonl",
    input_format: Annotated[
        InputFormat | None,
        Parameter(name="--format", help="The input's format. Default: by its extension."),
    ] = None,
    column: Annotated[
        str | None,
        Parameter(
            name="--column",
            help="The column or field of the sources. Default: url, uri or source.",
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
    parameters = _gather(prompts, questions, tags)
    builders = choose_models(models, parameters)
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
    if source is None and (input_format is not None or column is not None):
        raise CommandError("--format and --column describe an --input, and there is none.")
    plan = RunPlan(
        models=builders,
        source=None
        if source is None
        else open_source(source, input_format=input_format, column=column),
        samples=DEFAULT_SAMPLES if samples is None else samples,
        output=output,
        permits=permits,
        limit=limit,
        emulated=emulated,
    )
    console = build_console()
    return _perform(perform_run(plan, console))


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
