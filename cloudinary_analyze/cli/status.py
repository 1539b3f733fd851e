"""``cloudinary-analyze status``: what the service says of a task."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.json import JSON
from rich.text import Text

from cloudinary_analyze._wire import codec
from cloudinary_analyze.cli.screen import CommandError, ExitCode, is_interactive, show_logs
from cloudinary_analyze.cli.service import EMULATOR_ASIDE, read_credentials
from cloudinary_analyze.cli.single import choose_code
from cloudinary_analyze.errors import AnalyzeError, NotFoundError
from cloudinary_analyze.responses import TaskStatus
from cloudinary_analyze.session import AnalyzeSession

_STYLES = {"completed": "green", "failed": "red"}


async def perform_status(task_id: str, console: Console) -> ExitCode:
    """Ask for a task's status once and print it.

    Raises:
        CommandError: There is none; its sentence says why.
    """
    with show_logs(console):
        async with AnalyzeSession(read_credentials(EMULATOR_ASIDE)) as session:
            try:
                status = await session.task_status(task_id)
            except NotFoundError as error:
                raise CommandError(
                    f"The service knows no such task: {error}", exit_code=ExitCode.FAILURES
                ) from error
            except AnalyzeError as error:
                raise CommandError(str(error), exit_code=choose_code(error)) from error
    if is_interactive(sys.stdout):
        _print_status(Console(file=sys.stdout), status)
    else:
        print(codec.dumps(status.raw).decode())
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
