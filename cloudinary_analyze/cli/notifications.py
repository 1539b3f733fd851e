"""Receiving of notifications: for the tasks of a run, and for ``cloudinary-analyze listen``.

A task's webhook is acknowledged only once its result is durable. If this process is killed before,
the sender delivers the webhook again.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, TypeAlias

import attrs
from cyclopts import Parameter
from rich.console import Console
from rich.json import JSON
from rich.text import Text

from cloudinary_analyze.cli.outlet import Outlet
from cloudinary_analyze.cli.screen import (
    CommandError,
    ExitCode,
    build_console,
    check_stdout,
    encode_json,
    explain_stdout,
    handle_interrupts,
    is_interactive,
    say,
    show_logs,
)
from cloudinary_analyze.cli.service import EMULATOR_ASIDE, HIGHEST_PORT, Service, read_credentials
from cloudinary_analyze.cli.text import read_count
from cloudinary_analyze.errors import LedgerError, describe_reason
from cloudinary_analyze.events import Event, NotificationSeen
from cloudinary_analyze.notifications.receiver import DROPPED
from cloudinary_analyze.outcomes import AnyOutcome
from cloudinary_analyze.protocols import NotificationSink, NotificationSource
from cloudinary_analyze.responses import Delivery, Notification
from cloudinary_analyze.webhooks import parse_delivery

if TYPE_CHECKING:
    from aiohttp import web

    from cloudinary_analyze.cli.connections import Limits

WAYS: Final = (
    "--receive HOST:PORT --public-url URL (webhooks come to this process) or --redis URL "
    "(a receiver elsewhere puts them into Redis)"
)
PARKED_SECONDS: Final = 1.0
STOP_SECONDS: Final = 0.1

Handle: TypeAlias = "Callable[[web.Request], Awaitable[web.StreamResponse]]"


@Parameter(name="*")
@attrs.frozen(kw_only=True)
class ReceivingOptions:
    """The options for receiving the results of a run.

    Attributes:
        mode: Whether images are analyzed by calls or by tasks.
        receive: Address and port where webhooks are received, as ``HOST:PORT``.
        public_url: Where the service sends them. ``None``: as configured in the account.
        redis: The URL of a Redis that a receiver elsewhere fills.
    """

    mode: Annotated[
        Literal["call", "task"], Parameter(name="--mode", help="Make calls, or submit tasks.")
    ] = "call"
    receive: Annotated[
        str | None,
        Parameter(
            name="--receive",
            help="With --mode task: HOST:PORT to listen on for webhooks (any path).",
        ),
    ] = None
    public_url: Annotated[
        str | None,
        Parameter(
            name="--public-url",
            help="URL that leads to --receive, or to the receiver that fills --redis.",
        ),
    ] = None
    redis: Annotated[
        str | None,
        Parameter(
            name="--redis",
            help="With --mode task: URL of the Redis that a receiver, such as `listen`, fills. Its "
            "password comes from REDIS_URL.",
        ),
    ] = attrs.field(default=None, repr=False)

    @property
    def as_tasks(self) -> bool:
        """Whether the run submits tasks."""
        return self.mode == "task"

    def check(self, *, emulated: bool) -> None:
        """Check in advance that results can arrive.

        Raises:
            CommandError: The options do not fit together.
        """
        given = [
            name
            for name, value in (("--receive", self.receive), ("--redis", self.redis))
            if value is not None
        ]
        named = given + ([] if self.public_url is None else ["--public-url"])
        if not self.as_tasks:
            if named:
                raise CommandError(f"{named[0]} is for tasks; add --mode task.")
            return
        if emulated:
            if named:
                raise CommandError(
                    f"The emulator delivers its webhooks to a built-in receiver. Omit {named[0]}."
                )
            return
        if len(given) != 1:
            which = "only one of these" if given else "one of these"
            raise CommandError(
                f"--mode task needs a way to receive results. Pass {which}: {WAYS}. "
                "Or add --emulator, which has a receiver."
            )
        if self.receive is not None:
            if self.public_url is None:
                raise CommandError(
                    "--receive needs --public-url with the address that leads there from outside, "
                    "because the service must know where to send its webhooks."
                )
            read_address(self.receive)


CALLS: Final = ReceivingOptions()


def read_address(text: str) -> tuple[str, int]:
    """Read ``HOST:PORT``. An IPv6 address is in brackets.

    Raises:
        CommandError: It has another form.
    """
    host, _, port = text.rpartition(":")
    number = read_count(port)
    if not host or number is None or number > HIGHEST_PORT:
        raise CommandError(f"--receive takes HOST:PORT, such as 0.0.0.0:8080; not {text!r:.60}.")
    return host.removeprefix("[").removesuffix("]"), number


@attrs.define(eq=False)
class Line:
    """Receives the notifications of a run's tasks.

    Attributes:
        source: The notification source for the session.
        url: Where the service sends them. ``None``: as configured in the account.
    """

    source: NotificationSource
    url: str | None

    def hear(self, event: Event) -> None:
        """Take an event of the session."""
        source = self.source
        if not isinstance(source, _Waiting) or not isinstance(event, NotificationSeen):
            return
        if event.task_id is None or event.verdict == "resolved":
            return  # the result is resolved, but not recorded yet
        if event.verdict == "parked":
            source.park(event.task_id)
        else:
            # soon, because the listener still uses it
            asyncio.get_running_loop().call_soon(source.release, event.task_id)

    def note_outcome(self, outcome: AnyOutcome) -> None:
        """Acknowledge the notification of an outcome, unless the ledger could not record it."""
        if outcome.unrecorded or isinstance(outcome.error, LedgerError):
            return
        if not isinstance(self.source, _Waiting):
            return
        task_id = getattr(outcome.error, "task_id", None)
        if outcome.response is not None:
            task_id = outcome.response.raw.get("task_id")
        if isinstance(task_id, str):
            self.source.release(task_id)


class UnknownTaskError(Exception):
    """A notification is for a task without a waiting handle here."""


@attrs.define(eq=False)
class _Waiting:
    """A queue whose `put` returns once the result of the delivery is recorded."""

    queue: asyncio.Queue[Delivery] = attrs.field(factory=asyncio.Queue)
    held: dict[str, list[asyncio.Future[None]]] = attrs.field(factory=dict)

    async def put(self, delivery: Delivery, /) -> None:
        task_id = parse_delivery(delivery).task_id or ""
        kept = asyncio.get_running_loop().create_future()
        held = self.held.setdefault(task_id, [])
        held.append(kept)
        self.queue.put_nowait(delivery)
        try:
            await kept
        finally:
            held.remove(kept)
            if not held and self.held.get(task_id) is held:
                del self.held[task_id]

    async def listen(self) -> AsyncIterator[Delivery]:
        while True:
            yield await self.queue.get()

    def release(self, task_id: str) -> None:
        """Respond to the webhooks of a task whose result is recorded."""
        for kept in self.held.get(task_id, ()):
            if not kept.done():
                kept.set_result(None)

    def park(self, task_id: str) -> None:
        """Ask the sender to try again later, unless the task becomes known and is answered soon."""
        asyncio.get_running_loop().call_later(PARKED_SECONDS, self._refuse, task_id)

    def _refuse(self, task_id: str) -> None:
        for kept in self.held.get(task_id, ()):
            if not kept.done():
                kept.set_exception(UnknownTaskError("the run has no task with this id"))


@asynccontextmanager
async def open_line(
    options: ReceivingOptions, service: Service, console: Console
) -> AsyncIterator[Line | None]:
    """Open the receiver of tasks' results. ``None`` if the run submits no tasks.

    Raises:
        CommandError: It cannot be opened.
        ConfigurationError: The credentials contain no secret to verify with, or the plan is
            invalid.
    """
    if not options.as_tasks:
        yield None
    elif options.redis is not None:
        async with open_redis(options.redis) as notifications:
            yield Line(notifications, options.public_url)
    else:
        from cloudinary_analyze.notifications.aiohttp import WebhookReceiver

        waiting = _Waiting()
        handle = WebhookReceiver(waiting, service.credentials).handle
        address = ("127.0.0.1", 0) if options.receive is None else read_address(options.receive)
        async with serve(handle, *address) as origin:
            if options.receive is not None:
                say(console, f"Receiving webhooks on {origin}.", style="dim")
            yield Line(waiting, options.public_url or f"{origin}/")


def open_redis(url: str) -> AbstractAsyncContextManager[Any]:
    """Return the notifications in Redis, as sink and source.

    Raises:
        CommandError: The [redis] extra is missing.
        ConfigurationError: The URL is invalid.
    """
    try:
        from cloudinary_analyze.notifications.redis import RedisNotifications
    except ImportError as error:
        raise CommandError(str(error)) from None
    return RedisNotifications(url)


@asynccontextmanager
async def serve(
    handle: Handle, host: str, port: int, limits: Limits | None = None
) -> AsyncIterator[str]:
    """Serve requests for every path, and yield the origin.

    Raises:
        CommandError: The port cannot be listened on.
    """
    from aiohttp import web

    from cloudinary_analyze.cli.connections import LIMITS, Connections, build_server_logger

    connections = Connections(LIMITS if limits is None else limits)
    app = web.Application(middlewares=[connections.track])
    app.router.add_route("*", "/{path:.*}", handle, expect_handler=_handle_expect)
    runner = web.AppRunner(
        app,
        access_log=None,
        logger=build_server_logger(),
        auto_decompress=False,  # a signature is of the bytes as sent
        shutdown_timeout=STOP_SECONDS,
    )
    await runner.setup()
    assert runner.server is not None
    accept = partial(connections.accept, runner.server)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(runner.cleanup)
        try:
            server = await asyncio.get_running_loop().create_server(accept, host, port)
        except (OSError, ValueError) as error:
            reason = describe_reason(error)
            raise CommandError(f"Webhooks cannot be received on {host}:{port}: {reason}.") from None
        stack.callback(server.close)
        shown = f"[{host}]" if ":" in host else host
        yield f"http://{shown}:{server.sockets[0].getsockname()[1]}"


async def _handle_expect(request: web.Request) -> None:
    """Answer ``Expect: 100-continue``. aiohttp's own handler fails if the header is not UTF-8."""
    from aiohttp import web

    if request.headers.get("Expect", "").lower() != "100-continue":
        raise web.HTTPExpectationFailed
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")


@attrs.frozen(kw_only=True)
class ListenPlan:
    """The options of ``listen``.

    Attributes:
        host: The address to listen on.
        port: The port to listen on; 0 takes a free one.
        path: The path of notifications.
        redis: The URL of a Redis to also store them in.
    """

    host: str
    port: int
    path: str
    redis: str | None = attrs.field(repr=False)


@attrs.define(eq=False)
class _Printer(NotificationSink):
    """Prints verified notifications, once they are stored.

    If they are stored in Redis, the output may fail or fall behind. Otherwise the sender gets its
    response once the notification is printed.
    """

    inner: NotificationSink | None
    ended: asyncio.Event
    outlet: Outlet
    console: Console
    failure: OSError | None = None

    async def put(self, delivery: Delivery, /) -> None:
        if self.inner is not None:
            await self.inner.put(delivery)
        text = _show(parse_delivery(delivery), delivery)
        data = text.encode(sys.stdout.encoding or "utf-8", "backslashreplace")
        if self.inner is not None:
            self.outlet.put(data)
            if self.failure is None and (failure := self.outlet.failure) is not None:
                self.failure = failure
                sentence = f"{explain_stdout(failure)} Notifications are still stored in Redis."
                say(self.console, sentence, style="yellow")
            return
        try:
            await self.outlet.write(data)
        except OSError as error:
            self.failure = error
            self.ended.set()
            raise


def _show(notification: Notification, delivery: Delivery) -> str:
    if not is_interactive(sys.stdout):
        return encode_json(dict(notification.raw)) + "\n"
    instant = ""
    if delivery.received_at is not None:
        instant = f"{datetime.fromtimestamp(delivery.received_at, UTC):%H:%M:%S} UTC  "
    state = ("failed", "bold red") if notification.failed else ("ok", "bold green")
    content = (notification.error if notification.failed else notification.data) or notification.raw
    console = build_console(sys.stdout)
    with console.capture() as shown:
        console.print(
            Text.assemble((instant, "dim"), state, f"  {notification.task_id}"), soft_wrap=True
        )
        console.print(JSON.from_data(content), soft_wrap=True)
    return shown.get()


async def perform_listen(plan: ListenPlan, console: Console) -> ExitCode:
    """Print notifications until an interrupt.

    Raises:
        CommandError: It cannot be started, or the reader of the output has gone.
        ConfigurationError: The credentials hold no secret to verify with.
    """
    check_stdout()
    credentials = read_credentials(EMULATOR_ASIDE)
    ended = asyncio.Event()
    outlet = Outlet(sys.stdout.fileno())
    async with AsyncExitStack() as stack:
        stack.callback(outlet.close)
        stack.enter_context(show_logs(console))
        inner = None
        if plan.redis is not None:
            inner = await stack.enter_async_context(open_redis(plan.redis))
        printer = _Printer(inner, ended, outlet, console)
        stack.enter_context(handle_interrupts(ended.set, ended.set))
        from cloudinary_analyze.notifications.aiohttp import WebhookReceiver

        handle = _show_refusals(WebhookReceiver(printer, credentials).handle, plan, console)
        origin = await stack.enter_async_context(serve(handle, plan.host, plan.port))
        say(console, f"Listening on {origin}{plan.path} (Ctrl-C ends it).")
        await ended.wait()
    if inner is None and printer.failure is not None:
        raise CommandError(explain_stdout(printer.failure), exit_code=ExitCode.STOPPED)
    return ExitCode.DONE


def _show_refusals(handle: Handle, plan: ListenPlan, console: Console) -> Handle:
    """Return a handler for one path, which reports refusals."""
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
