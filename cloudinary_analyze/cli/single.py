"""``cloudinary-analyze analyze``: one source, one model, shown at once."""

from __future__ import annotations

import sys
from typing import Any

import attrs
from rich.console import Console
from rich.json import JSON
from rich.text import Text

from cloudinary_analyze._wire import codec
from cloudinary_analyze.cli.models import BuildRequest
from cloudinary_analyze.cli.screen import (
    CommandError,
    ExitCode,
    describe_quota,
    is_interactive,
    show_logs,
)
from cloudinary_analyze.cli.service import open_service
from cloudinary_analyze.errors import (
    AnalyzeError,
    AuthenticationError,
    PermissionDeniedError,
    QuotaExceededError,
)
from cloudinary_analyze.requests import Asset, Uri
from cloudinary_analyze.responses import Response
from cloudinary_analyze.session import AnalyzeSession


@attrs.frozen(kw_only=True)
class SinglePlan:
    """What to analyse.

    Attributes:
        build: Builds the request.
        source: Of what.
        emulated: Whether to call an emulator in this process.
    """

    build: BuildRequest
    source: Uri | Asset
    emulated: bool


async def perform_analyze(plan: SinglePlan, console: Console) -> ExitCode:
    """Analyse one source and print the answer.

    Raises:
        CommandError: There is no answer; its sentence says why.
        ConfigurationError: The credentials cannot be right.
    """
    async with open_service(emulated=plan.emulated, console=console) as service:
        with show_logs(console):
            async with AnalyzeSession(service.credentials) as session:
                try:
                    response = await session.analyze(plan.build(plan.source))
                except AnalyzeError as error:
                    raise CommandError(str(error), exit_code=choose_code(error)) from error
    if is_interactive(sys.stdout):
        _print_response(Console(file=sys.stdout), response)
    else:
        print(codec.dumps(response.raw).decode())
    return ExitCode.DONE


def choose_code(error: AnalyzeError) -> ExitCode:
    """Return what the process ends with for the error of one call."""
    if isinstance(error, AuthenticationError | PermissionDeniedError | QuotaExceededError):
        return ExitCode.STOPPED
    return ExitCode.FAILURES


def _print_response(console: Console, response: Response[Any]) -> None:
    console.print(
        Text.assemble((response.model, "bold"), f"  {response.entity or ''}"), soft_wrap=True
    )
    console.print(JSON.from_data(response.raw.get("data", {}).get("analysis")), soft_wrap=True)
    quota = describe_quota({limit.type: limit for limit in response.limits})
    told = [f"request id: {response.request_id}" if response.request_id else "", quota]
    console.print(Text(" · ".join(filter(None, told)), style="dim"), soft_wrap=True)
