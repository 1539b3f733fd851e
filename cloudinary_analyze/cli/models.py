"""The models that a command uses, with their parameters; and ``cloudinary-analyze models``."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from functools import partial
from pathlib import Path, PurePath
from typing import Annotated, Any, Final

import attrs
from cyclopts import Parameter
from rich.console import Console
from rich.text import Text

from cloudinary_analyze._values import quote
from cloudinary_analyze.cli.input import FORMATS
from cloudinary_analyze.cli.screen import (
    CommandError,
    ExitCode,
    build_console,
    build_table,
    check_stdout,
    is_interactive,
    showing_results,
)
from cloudinary_analyze.errors import InvalidRequestError
from cloudinary_analyze.requests import (
    MODELS,
    AIVisionGeneral,
    AIVisionModeration,
    AIVisionTagging,
    AnalyzeRequest,
    Asset,
    TagDefinition,
    Uri,
    read_model_name,
)

BuildRequest = Callable[[Uri | Asset], AnalyzeRequest[Any]]

PICTURES: Final = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
OPTIONS: Final[Mapping[str, str]] = {
    AIVisionGeneral.model_name: "--prompt",
    AIVisionModeration.model_name: "--question",
    AIVisionTagging.model_name: "--tag",
}
"""The option that a model requires."""

_ANY_SOURCE: Final = Uri("https://example.com/")


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class Parameters:
    """The parameters of the AI Vision models.

    Attributes:
        prompts: For `AIVisionGeneral`.
        questions: For `AIVisionModeration`.
        tags: ``name=description``, for `AIVisionTagging`.
    """

    prompts: Annotated[
        tuple[str, ...],
        Parameter(
            name="--prompt",
            help="Prompt for ai_vision_general; up to 10 times.",
            show_default=False,
        ),
    ] = ()
    questions: Annotated[
        tuple[str, ...],
        Parameter(
            name="--question",
            help="Yes/no question for ai_vision_moderation; up to 10 times.",
            show_default=False,
        ),
    ] = ()
    tags: Annotated[
        tuple[str, ...],
        Parameter(
            name="--tag",
            help="name=description of a tag for ai_vision_tagging; up to 10 times.",
            show_default=False,
        ),
    ] = ()


NO_PARAMETERS: Final = Parameters()


def choose_models(names: Sequence[str], parameters: Parameters) -> dict[str, BuildRequest]:
    """Return the builder of requests for each model name, in the given order.

    Raises:
        CommandError: A model is unknown, lacks its parameters, or a parameter has no model.
    """
    if not names:
        raise CommandError(f"Name at least one model: {_list_models()}.")
    models = dict.fromkeys(map(_read_model, names))
    given = {"--prompt": parameters.prompts, "--question": parameters.questions}
    given["--tag"] = parameters.tags
    for model, option in OPTIONS.items():
        if model in models and not given[option]:
            raise CommandError(
                f"The model {model} needs {option}, 1 to 10 times; nothing was sent. "
                f"For example: {option} {_EXAMPLES[option]}"
            )
        if model not in models and given[option]:
            raise CommandError(f"{option} is for the model {model} alone, which was not named.")
    builders = {model: _choose_builder(model, parameters) for model in models}
    for model, build in builders.items():
        try:
            build(_ANY_SOURCE)
        except InvalidRequestError as error:
            raise CommandError(f"{OPTIONS.get(model, model)}: {error.message}") from None
    return builders


_EXAMPLES: Final = {
    "--prompt": "'What is in the foreground?'",
    "--question": "'Is a weapon visible?'",
    "--tag": "'outdoors=Was it taken under the open sky?'",
}


def _read_model(name: str) -> str:
    model = read_model_name(name)
    if model in MODELS:
        return model
    if _may_be_source(name):
        raise CommandError(
            f"{quote(name)} is not a model. Pass what to analyze after the model: "
            "cloudinary-analyze run MODEL --input FILE, or cloudinary-analyze analyze MODEL URL."
        )
    near = get_close_matches(model, MODELS, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise CommandError(f"Unknown model {quote(name)}.{hint} The models are: {_list_models()}.")


def _may_be_source(name: str) -> bool:
    """Whether a file, a URL or an asset was passed instead of a model."""
    if "://" in name or name[:5].lower() in {"data:", "asset"} or "/" in name:
        return True
    return Path(name).exists() or PurePath(name).suffix.lower() in {*FORMATS, *PICTURES} - {""}


def _list_models() -> str:
    return ", ".join(MODELS)


def _choose_builder(model: str, parameters: Parameters) -> BuildRequest:
    if model == AIVisionGeneral.model_name:
        return partial(AIVisionGeneral, prompts=parameters.prompts)
    if model == AIVisionModeration.model_name:
        return partial(AIVisionModeration, rejection_questions=parameters.questions)
    if model == AIVisionTagging.model_name:
        definitions = tuple(map(_read_tag, parameters.tags))
        return partial(AIVisionTagging, tag_definitions=definitions)
    return MODELS[model]


def _read_tag(text: str) -> TagDefinition:
    name, equals, description = text.partition("=")
    if not equals:
        raise CommandError(
            f"--tag takes name=description, and {text!r} has no '='. "
            f"For example: --tag {_EXAMPLES['--tag']}"
        )
    try:
        return TagDefinition(name.strip(), description.strip())
    except InvalidRequestError as error:
        raise CommandError(f"--tag: {error.message}") from None


def list_models() -> list[tuple[str, str, str, str]]:
    """Return a row for each model: name, add-on feature, required option, description."""
    return [
        (name, kind.feature or "", OPTIONS.get(name, ""), _describe(kind.__doc__ or ""))
        for name, kind in MODELS.items()
    ]


def print_models(_console: Console) -> ExitCode:
    """Print the models: a table on a terminal, otherwise tab-separated lines."""
    rows = list_models()
    check_stdout()
    with showing_results():
        if is_interactive(sys.stdout):
            table = build_table("model", "add-on quota", "needs", "what it does")
            for row in rows:
                table.add_row(*map(Text, row))
            build_console(sys.stdout).print(table)
        else:
            print("\n".join(map("\t".join, rows)))
    return ExitCode.DONE


def _describe(docstring: str) -> str:
    sentence = docstring.partition("\n")[0]
    return re.sub(r" \(``[^)]*\)", "", sentence)
