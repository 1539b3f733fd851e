"""The service that commands call: the account of the environment, or an emulator."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final, Literal

import attrs
from rich.console import Console

from cloudinary_analyze.cli.screen import CommandError, ExitCode, handle_interrupts, say, show_logs
from cloudinary_analyze.config import URL_FORM, URL_VARIABLE, Credentials
from cloudinary_analyze.errors import ConfigurationError

if TYPE_CHECKING:
    from cloudinary_analyze.emulator import Emulator

CLOUD_VARIABLE: Final = "CLOUDINARY_CLOUD_NAME"
WEBHOOKS: Final = 256
EMULATOR_ASIDE: Final = "start `cloudinary-analyze emulator`, and export what it prints"
NO_ACCOUNT: Final = "add --emulator to try it on this machine, without an account"


@attrs.frozen
class Service:
    """Whom to call.

    Attributes:
        credentials: As whom.
        emulator: The emulator that was started for it, if it is one.
    """

    credentials: Credentials
    emulator: Emulator | None = None


@asynccontextmanager
async def open_service(*, emulated: bool, console: Console) -> AsyncIterator[Service]:
    """Find the credentials, or start an emulator for as long as the block lasts.

    Raises:
        CommandError: There are no credentials, or they cannot be right.
    """
    if not emulated:
        yield Service(read_credentials())
        return
    from cloudinary_analyze.emulator import Emulator, WebhookPolicy

    # its webhooks are answered only once their results are kept, so many must be under way
    policy = WebhookPolicy(concurrency=WEBHOOKS)
    async with Emulator(count_sources=False, webhooks=policy) as emulator:
        say(console, emulator.banner(), style="dim")
        yield Service(Credentials.from_url(emulator.cloudinary_url), emulator)


def read_credentials(way_out: str = NO_ACCOUNT) -> Credentials:
    """Return the credentials of the environment.

    Raises:
        CommandError: There are none, or they cannot be right; what else there is to do follows.
    """
    if not any(os.environ.get(name, "").strip() for name in (URL_VARIABLE, CLOUD_VARIABLE)):
        raise CommandError(
            f"There are no credentials. Set {URL_VARIABLE}={URL_FORM} "
            f"(the Console's dashboard shows it), or {way_out}."
        )
    try:
        return Credentials.from_environment()
    except ConfigurationError as error:
        raise CommandError(f"{error.message} Or {way_out}.") from None


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
