"""``cloudinary-analyze listen``: a development receiver, which can also store into Redis."""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import attrs
from rich.console import Console
from rich.json import JSON
from rich.text import Text

from cloudinary_analyze._wire import codec
from cloudinary_analyze.cli.console import (
    CommandError,
    ExitCode,
    is_interactive,
    say,
    show_logs,
)
from cloudinary_analyze.cli.interrupts import handle_interrupts
from cloudinary_analyze.cli.receiving import Handle, open_redis, serve
from cloudinary_analyze.cli.service import EMULATOR_ASIDE, read_credentials
from cloudinary_analyze.notifications.receiver import DROPPED
from cloudinary_analyze.protocols import NotificationSink
from cloudinary_analyze.responses import Delivery, Notification
from cloudinary_analyze.webhooks import parse_delivery

if TYPE_CHECKING:
    from aiohttp import web


@attrs.frozen(kw_only=True)
class ListenPlan:
    """What to listen to.

    Attributes:
        host: The address to listen on.
        port: The port to listen on; 0 takes a free one.
        path: The path that notifications are taken at.
        redis: The URL of a Redis to put them into, too.
    """

    host: str
    port: int
    path: str
    redis: str | None = attrs.field(repr=False)


@attrs.define(eq=False)
class _Printer(NotificationSink):
    """Shows what was verified, once it is stored."""

    inner: NotificationSink | None
    ended: asyncio.Event
    cut_off: bool = False

    async def put(self, delivery: Delivery, /) -> None:
        if self.inner is not None:
            await self.inner.put(delivery)
        try:
            _show(parse_delivery(delivery), delivery)
            sys.stdout.flush()
        except BrokenPipeError:
            self.cut_off = True
            self.ended.set()
            if self.inner is None:
                raise


def _show(notification: Notification, delivery: Delivery) -> None:
    if not is_interactive(sys.stdout):
        print(codec.dumps(notification.raw).decode())
        return
    instant = ""
    if delivery.received_at is not None:
        instant = f"{datetime.fromtimestamp(delivery.received_at, UTC):%H:%M:%S} UTC  "
    state = ("failed", "bold red") if notification.failed else ("ok", "bold green")
    console = Console(file=sys.stdout)
    console.print(
        Text.assemble((instant, "dim"), state, f"  {notification.task_id}"), soft_wrap=True
    )
    told = (notification.error if notification.failed else notification.data) or notification.raw
    console.print(JSON.from_data(told), soft_wrap=True)


async def perform_listen(plan: ListenPlan, console: Console) -> ExitCode:
    """Show notifications until an interrupt.

    Raises:
        CommandError: It cannot be begun, or nobody reads what is shown any more.
        ConfigurationError: The credentials hold no secret to verify with.
    """
    credentials = read_credentials(EMULATOR_ASIDE)
    ended = asyncio.Event()
    async with AsyncExitStack() as stack:
        stack.enter_context(show_logs(console))
        inner = None
        if plan.redis is not None:
            inner = await stack.enter_async_context(open_redis(plan.redis))
        printer = _Printer(inner, ended)
        stack.enter_context(handle_interrupts(ended.set, ended.set))
        from cloudinary_analyze.notifications.aiohttp import WebhookReceiver

        handle = _tell_refusals(WebhookReceiver(printer, credentials).handle, plan, console)
        origin = await stack.enter_async_context(serve(handle, plan.host, plan.port))
        say(console, f"Listening on {origin}{plan.path} (Ctrl-C ends it).")
        await ended.wait()
    if printer.cut_off:
        sys.stdout = None  # or the interpreter flushes it, and fails
        raise CommandError(
            "Whoever read standard output reads no more.", exit_code=ExitCode.STOPPED
        )
    return ExitCode.DONE


def _tell_refusals(handle: Handle, plan: ListenPlan, console: Console) -> Handle:
    """Return a handler that takes one path, and says what it does not take."""
    from aiohttp import web

    async def take(request: web.Request) -> web.StreamResponse:
        if request.path != plan.path:
            response: web.StreamResponse = web.Response(
                status=404, text=f"Notifications are taken at {plan.path}."
            )
        else:
            response = await handle(request)
        text = response.text if isinstance(response, web.Response) else None
        if response.status != 200:
            line = f"Refused with {response.status}: {request.method} {request.path}: {text}"
            say(console, line, style="yellow")
        elif text == DROPPED.text:
            say(console, DROPPED.text, style="dim")
        return response

    return take
