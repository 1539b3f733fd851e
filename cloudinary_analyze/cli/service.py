"""Whom the commands call: the account of the environment, or an emulator in this process."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import attrs
from rich.console import Console

from cloudinary_analyze.cli.screen import CommandError, say
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
