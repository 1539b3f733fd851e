"""``cloudinary-analyze emulator``: the emulator until Ctrl-C."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Literal

import attrs
from rich.console import Console

from cloudinary_analyze.cli.screen import CommandError, ExitCode, handle_interrupts, say, show_logs


@attrs.frozen(kw_only=True)
class EmulatorPlan:
    """What to emulate.

    Attributes:
        host: The address to listen on.
        port: The port to listen on; 0 takes a free one.
        latency: Seconds that an analysis takes, or ``"realistic"``.
        quotas: Units per add-on feature; features left out never run out.
    """

    host: str
    port: int
    latency: float | Literal["realistic"] | None
    quotas: Mapping[str, int] | None


def read_quotas(texts: Sequence[str]) -> dict[str, int] | None:
    """Read ``feature=units`` each.

    Raises:
        CommandError: One has another form.
    """
    quotas: dict[str, int] = {}
    for text in texts:
        name, _, units = text.partition("=")
        if not units.strip().isdecimal():
            raise CommandError(f"--quota takes feature=units, such as ai_vision=500; not {text!r}.")
        quotas[name.strip()] = int(units)
    return quotas or None


def read_latency(text: str | None) -> float | Literal["realistic"] | None:
    """Read seconds or ``realistic``.

    Raises:
        CommandError: It is neither.
    """
    if text is None:
        return None
    if text == "realistic":
        return "realistic"
    try:
        return float(text)
    except ValueError:
        raise CommandError(f"--latency takes seconds or 'realistic'; not {text!r}.") from None


async def serve(plan: EmulatorPlan, console: Console) -> ExitCode:
    """Run the emulator until an interrupt.

    Raises:
        CommandError: It cannot be started so.
    """
    from cloudinary_analyze.emulator import Emulator

    try:
        emulator = Emulator(
            host=plan.host,
            port=plan.port,
            latency=plan.latency,
            quotas=plan.quotas,
            count_sources=False,
        )
    except ValueError as error:
        raise CommandError(str(error)) from None
    ended = asyncio.Event()
    with handle_interrupts(ended.set, ended.set), show_logs(console):
        try:
            await emulator.start()
        except (OSError, OverflowError) as error:
            raise CommandError(
                f"The emulator cannot listen on {plan.host}:{plan.port}: {error}. "
                "Another --port, or 0 for a free one?"
            ) from None
        try:
            say(console, f"{emulator.banner()} Ctrl-C ends it.")
            print(f"export CLOUDINARY_URL='{emulator.cloudinary_url}'", flush=True)
            await ended.wait()
        finally:
            await emulator.stop()
    return ExitCode.DONE
