"""``cloudinary-analyze analyze`` and ``status``: analyze one image, show one task."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import attrs
from rich.console import Console
from rich.json import JSON
from rich.table import Table
from rich.text import Text

from cloudinary_analyze._wire.protocol import find_result
from cloudinary_analyze.cli.models import BuildRequest
from cloudinary_analyze.cli.screen import (
    CommandError,
    ExitCode,
    build_console,
    build_table,
    check_stdout,
    is_interactive,
    print_json,
    show_logs,
    showing_results,
)
from cloudinary_analyze.cli.service import EMULATOR_ASIDE, Service, open_service, read_credentials
from cloudinary_analyze.config import Settings
from cloudinary_analyze.errors import (
    AnalyzeError,
    AuthenticationError,
    NotFoundError,
    PermissionDeniedError,
    QuotaExceededError,
)
from cloudinary_analyze.progress import describe_quota
from cloudinary_analyze.requests import Asset, Uri
from cloudinary_analyze.responses import Response, TaskStatus
from cloudinary_analyze.results.findings import NOTHING, Findings, Mark, read_findings
from cloudinary_analyze.session import AnalyzeSession


@attrs.frozen(kw_only=True)
class SinglePlan:
    """The options of ``analyze``.

    Attributes:
        build: Builds the request.
        source: The URL or asset.
        emulated: Whether to call an emulator in this process.
        proxy: The proxy that the command line names.
    """

    build: BuildRequest
    source: Uri | Asset
    emulated: bool
    proxy: str | None = attrs.field(default=None, repr=False)


async def perform_analyze(plan: SinglePlan, console: Console) -> ExitCode:
    """Analyze one source and print the response.

    Raises:
        CommandError: The call failed.
        ConfigurationError: The credentials are invalid.
    """
    check_stdout()
    async with open_service(emulated=plan.emulated, console=console) as service:
        with show_logs(console):
            settings = Settings(proxy=service.choose_proxy(plan.proxy))
            async with AnalyzeSession(service.credentials, settings=settings) as session:
                try:
                    response = await session.analyze(plan.build(plan.source))
                except AnalyzeError as error:
                    raise CommandError(str(error), exit_code=choose_code(error)) from error
    with showing_results():
        if is_interactive(sys.stdout):
            _print_response(build_console(sys.stdout), response)
        else:
            print_json(dict(response.raw))
    return ExitCode.DONE


def choose_code(error: AnalyzeError) -> ExitCode:
    """Return the exit code for the error of a call."""
    if isinstance(error, AuthenticationError | PermissionDeniedError | QuotaExceededError):
        return ExitCode.STOPPED
    return ExitCode.FAILURES


def _print_response(console: Console, response: Response[Any]) -> None:
    console.print(
        Text.assemble((response.model, "bold"), f"  {response.entity or ''}"), soft_wrap=True
    )
    findings = read_findings(find_result(response.raw))
    for text in (findings.caption, _describe_quality(findings), findings.rest):
        if text is not None:
            console.print(Text(text), soft_wrap=True)
    if findings.marks:
        console.print(_build_mark_table(findings.marks))
    if findings.answers:
        table = build_table("question", "answer")
        for number, answer in enumerate(findings.answers, start=1):
            question = f"prompt {number}" if answer.question is None else answer.question
            table.add_row(Text(question), Text(answer.value))
        console.print(table)
    if findings == NOTHING:
        console.print(Text("Nothing was found.", style="dim"))
    quota = describe_quota({limit.type: limit for limit in response.limits})
    shown = [f"request id: {response.request_id}" if response.request_id else "", quota]
    console.print(Text(" · ".join(filter(None, shown)), style="dim"), soft_wrap=True)


def _describe_quality(findings: Findings) -> str | None:
    quality = findings.quality
    if quality is None:
        return None
    score = "" if quality.score is None else f" (score {quality.score:.3g})"
    return f"quality: {quality.level}{score}"


def _build_mark_table(marks: Sequence[Mark]) -> Table:
    """Return the columns that any of the marks fills: label, confidence, box and note."""
    columns = {
        "label": [mark.label for mark in marks],
        "confidence": ["" if mark.score is None else f"{mark.score:.3f}" for mark in marks],
        "box (x, y, width, height)": [
            "" if mark.box is None else ", ".join(f"{number:.0f}" for number in mark.box)
            for mark in marks
        ],
        "note": [mark.note for mark in marks],
    }
    shown = {name: cells for name, cells in columns.items() if any(cells)}
    table = build_table()
    for name in shown:
        table.add_column(name, justify="right" if name == "confidence" else "left", overflow="fold")
    for row in zip(*shown.values(), strict=True):
        table.add_row(*map(Text, row))
    return table


_STYLES = {"completed": "green", "failed": "red"}


async def perform_status(task_id: str, proxy: str | None, console: Console) -> ExitCode:
    """Fetch a task's status once and print it.

    Raises:
        CommandError: The status could not be fetched.
    """
    check_stdout()
    with show_logs(console):
        service = Service(read_credentials(EMULATOR_ASIDE))
        settings = Settings(proxy=service.choose_proxy(proxy))
        async with AnalyzeSession(service.credentials, settings=settings) as session:
            try:
                status = await session.task_status(task_id)
            except NotFoundError as error:
                raise CommandError(
                    f"Task not found: {error}", exit_code=ExitCode.FAILURES
                ) from error
            except AnalyzeError as error:
                raise CommandError(str(error), exit_code=choose_code(error)) from error
    with showing_results():
        if is_interactive(sys.stdout):
            _print_status(build_console(sys.stdout), status)
        else:
            print_json(dict(status.raw))
    return ExitCode.DONE


def _print_status(console: Console, status: TaskStatus) -> None:
    style = _STYLES.get(status.state, "yellow")
    console.print(
        Text.assemble((status.state, f"bold {style}"), f"  {status.task_id}"), soft_wrap=True
    )
    console.print(JSON.from_data(dict(status.raw)), soft_wrap=True)
    if status.state == "completed":
        console.print(
            Text("The result comes by notification; a status never carries it.", style="dim")
        )
