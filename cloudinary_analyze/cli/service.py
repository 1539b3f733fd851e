"""The service that commands call: the account of the environment, or an emulator."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import attrs
from cyclopts import Parameter, validators
from rich.console import Console

from cloudinary_analyze.cli.screen import CommandError, ExitCode, handle_interrupts, say, show_logs
from cloudinary_analyze.cli.text import read_count
from cloudinary_analyze.config import (
    DEFAULT_HOST,
    MOST_PERMITS,
    URL_FORM,
    URL_VARIABLE,
    Credentials,
    Settings,
    proxy_from_environment,
    read_base_url,
)
from cloudinary_analyze.errors import ConfigurationError, describe_reason
from cloudinary_analyze.ledger.sqlite import PATIENCE

if TYPE_CHECKING:
    from cloudinary_analyze.emulator import Emulator

CLOUD_VARIABLE: Final = "CLOUDINARY_CLOUD_NAME"
WEBHOOKS: Final = 256
EMULATOR_ASIDE: Final = "start `cloudinary-analyze emulator`, and export what it prints"
NO_ACCOUNT: Final = "add --emulator to try it on this machine, without an account"


HIGHEST_PORT: Final = 65_535


def check_host(_kind: Any, host: str) -> None:
    """Refuse an empty address, which would listen on all of them; a validator of cyclopts.

    Raises:
        ValueError: It is empty.
    """
    if not host.strip():
        raise ValueError("Name an address, such as 127.0.0.1, or 0.0.0.0 for all of them.")


def _get_default(name: str) -> Any:
    return attrs.fields_dict(Settings)[name].default


ProxyOption = Annotated[
    str | None,
    Parameter(
        name="--proxy",
        help="Proxy for all calls: http://HOST:PORT, or an empty string for none. Default: "
        "HTTPS_PROXY, except for hosts in NO_PROXY. Put a password into the variable, because "
        "other users can see command lines.",
    ),
]


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class CallOptions:
    """The settings of the session that a run can change.

    Attributes:
        host: See `Settings.host`.
        permits: See `Settings.permits`.
        attempts: See `Settings.attempts`.
        connect_timeout: See `Settings.connect_timeout`.
        read_timeout: See `Settings.read_timeout`.
        call_timeout: See `Settings.call_timeout`.
        task_timeout: See `Settings.task_timeout`.
        no_retry_ambiguous: See `Settings.retry_ambiguous`.
        rate: See `Settings.rate`.
        proxy: See `Settings.proxy`; ``None``: as the environment says.
        ledger_patience: See `SQLiteLedger`.
    """

    host: Annotated[
        str | None,
        Parameter(name="--host", help="Host or origin of the API, such as api-eu.cloudinary.com."),
    ] = None
    permits: Annotated[
        int,
        Parameter(
            name="--permits",
            help="Maximum number of calls in flight.",
            validator=validators.Number(gte=1, lte=MOST_PERMITS),
        ),
    ] = _get_default("permits")
    attempts: Annotated[
        int, Parameter(name="--attempts", help="Attempts per call, including the first.")
    ] = _get_default("attempts")
    connect_timeout: Annotated[
        float, Parameter(name="--connect-timeout", help="Seconds to connect, for one attempt.")
    ] = _get_default("connect_timeout")
    read_timeout: Annotated[
        float, Parameter(name="--read-timeout", help="Seconds for the response of one attempt.")
    ] = _get_default("read_timeout")
    call_timeout: Annotated[
        float | None,
        Parameter(
            name="--call-timeout",
            help="Seconds for a whole call, queueing and retries included. Default: no limit.",
        ),
    ] = None
    task_timeout: Annotated[
        float, Parameter(name="--task-timeout", help="Seconds to wait for the result of a task.")
    ] = _get_default("task_timeout")
    no_retry_ambiguous: Annotated[
        bool,
        Parameter(
            name="--no-retry-ambiguous",
            help="Do not repeat attempts that may have been charged. Their items fail.",
        ),
    ] = False
    rate: Annotated[
        float | None,
        Parameter(name="--rate", help="Attempts per second at most. Default: no limit."),
    ] = None
    proxy: ProxyOption = attrs.field(default=None, repr=False)
    ledger_patience: Annotated[
        float,
        Parameter(
            name="--ledger-patience",
            help="Seconds to keep trying while the ledger is locked or its disk is full. Then the "
            "responses that it lacks are saved elsewhere, and the run stops.",
            validator=validators.Number(gte=0),
        ),
    ] = PATIENCE

    def build_settings(
        self, service: Service, *, on_missing_result: Literal["raise", "analyze"]
    ) -> Settings:
        """Return the settings of the session.

        Raises:
            ConfigurationError: A value is invalid.
        """
        return Settings(
            permits=self.permits,
            attempts=self.attempts,
            connect_timeout=self.connect_timeout,
            read_timeout=self.read_timeout,
            call_timeout=self.call_timeout,
            task_timeout=self.task_timeout,
            retry_ambiguous=not self.no_retry_ambiguous,
            rate=self.rate,
            proxy=service.choose_proxy(self.proxy),
            on_missing_result=on_missing_result,
        )


DEFAULT_CALLS: Final = CallOptions()


@attrs.frozen
class Service:
    """The service to call.

    Attributes:
        credentials: The account.
        emulator: The emulator that was started for it, if any.
    """

    credentials: Credentials
    emulator: Emulator | None = None

    def choose_proxy(self, option: str | None) -> str | None:
        """Return the proxy to call through.

        Args:
            option: The value of the command line. ``None``: the environment decides.

        Raises:
            ConfigurationError: The proxy is invalid.
            CommandError: A proxy leads away from the emulator in this process.
        """
        if self.emulator is not None:
            if option:
                raise CommandError("--proxy has no meaning with --emulator; pass one of them.")
            return None
        return proxy_from_environment(self.credentials.host) if option is None else option

    def identify(self) -> dict[str, str]:
        """Return the owner of a ledger for this service; see `Ledger.open`."""
        cloud_name = self.credentials.cloud_name
        host = self.credentials.host or DEFAULT_HOST
        return {"base_url": read_base_url(host, cloud_name), "cloud_name": cloud_name}


@asynccontextmanager
async def open_service(
    *, emulated: bool, console: Console, host: str | None = None
) -> AsyncIterator[Service]:
    """Find the credentials, or start an emulator for the duration of the block.

    Args:
        emulated: Whether to start an emulator.
        console: Where to report the emulator.
        host: The host to call instead of that of the credentials.

    Raises:
        CommandError: The credentials are missing or invalid.
        ConfigurationError: The host is invalid.
    """
    if not emulated:
        credentials = read_credentials()
        yield Service(credentials if host is None else attrs.evolve(credentials, host=host))
        return
    if host is not None:
        raise CommandError("--host has no meaning with --emulator; pass one of them.")
    from cloudinary_analyze.emulator import Emulator, WebhookPolicy

    # its webhooks get responses only once their results are recorded, so many are in progress
    policy = WebhookPolicy(concurrency=WEBHOOKS)
    async with Emulator(count_sources=False, webhooks=policy) as emulator:
        say(console, emulator.banner(), style="dim")
        yield Service(Credentials.from_url(emulator.cloudinary_url), emulator)


def read_credentials(way_out: str = NO_ACCOUNT) -> Credentials:
    """Return the credentials of the environment.

    Raises:
        CommandError: They are missing or invalid. The message includes the alternatives.
    """
    if not any(os.environ.get(name, "").strip() for name in (URL_VARIABLE, CLOUD_VARIABLE)):
        raise CommandError(
            f"Missing credentials. Set {URL_VARIABLE}={URL_FORM} "
            f"(the Console's dashboard shows it), or {way_out}."
        )
    try:
        return Credentials.from_environment()
    except ConfigurationError as error:
        raise CommandError(f"{error.message} Or {way_out}.") from None


@attrs.frozen(kw_only=True)
class EmulatorPlan:
    """The options of ``emulator``.

    Attributes:
        host: The address to listen on.
        port: The port to listen on; 0 takes a free one.
        latency: Seconds that an analysis takes, or ``"realistic"``.
        quotas: Units per add-on feature. Other features never run out.
    """

    host: str
    port: int
    latency: float | Literal["realistic"] | None
    quotas: Mapping[str, int] | None


def read_quotas(texts: Sequence[str]) -> dict[str, int] | None:
    """Read a list of ``feature=units``.

    Raises:
        CommandError: One has another form.
    """
    quotas: dict[str, int] = {}
    for text in texts:
        name, _, units = text.partition("=")
        if (count := read_count(units)) is None:
            raise CommandError(
                f"--quota takes feature=units, such as ai_vision=500; not {text!r:.60}."
            )
        quotas[name.strip()] = count
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
        CommandError: It cannot listen there.
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
        except (OSError, ValueError) as error:
            raise CommandError(
                f"The emulator cannot listen on {plan.host}:{plan.port}: {describe_reason(error)}. "
                "Pass another --port, or 0 for a free one."
            ) from None
        try:
            say(console, f"{emulator.banner()} Ctrl-C ends it.")
            print(f"export CLOUDINARY_URL='{emulator.cloudinary_url}'", flush=True)
            await ended.wait()
        finally:
            await emulator.stop()
    return ExitCode.DONE
