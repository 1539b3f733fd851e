"""A real server with scripted responses, and helpers for sessions that call it."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import threading
import time
import types
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import Any, Self

import attrs
from aiohttp import web

from cloudinary_analyze import AnalyzeSession, Credentials, SessionStats, Settings
from cloudinary_analyze.testing import ManualClock

URL = "https://example.com/a.jpg"
KEY = "111222333444555"
SECRET = "planted-Api-Secret-8f3a"
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
SAMPLES = Path(__file__).parent / "samples"
HELD_SECONDS = 0.1  # without a response, after which a handler is taken to hold it
_sessions: weakref.WeakSet[AnalyzeSession] = weakref.WeakSet()


@attrs.frozen
class Seen:
    """A request that the server received."""

    method: str
    path: str
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@contextlib.asynccontextmanager
async def serve_aiohttp(handler: Any, **site: Any) -> AsyncIterator[str]:
    """Serve every request with a handler of aiohttp, and yield the URL without a path.

    Args:
        handler: Its own exceptions become a 500.
        site: Options of `web.TCPSite`, such as the port.
    """
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handler)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", **{"port": 0, **site}).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@attrs.define(eq=False)
class ScriptedServer:
    """Answers with one handler, and records the requests."""

    handler: Handler
    seen: list[Seen] = attrs.field(factory=list)
    in_flight: int = 0
    most_in_flight: int = 0
    url: str = ""
    _serving: Any = None

    @property
    def cloudinary_url(self) -> str:
        """The value of ``CLOUDINARY_URL`` that names this server."""
        return f"cloudinary://{KEY}:{SECRET}@demo?upload_prefix={self.url}"

    async def __aenter__(self) -> Self:
        self._serving = serve_aiohttp(self._answer)
        self.url = await self._serving.__aenter__()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._serving.__aexit__(None, None, None)

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        self.seen.append(Seen(request.method, request.raw_path, request.headers, body))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            return await self.handler(request)
        finally:
            self.in_flight -= 1

    def session(self, *, credentials: Credentials | None = None, **options: Any) -> AnalyzeSession:
        """Return a session to this server; other options are settings."""
        own = {
            name: options.pop(name)
            for name in ("clock", "http", "on_event", "notifications", "notification_url")
            if name in options
        }
        session = AnalyzeSession(
            credentials or Credentials("demo", KEY, SECRET),
            settings=Settings(
                **{"host": self.url, "backoff_first": 0.001, "backoff_max": 0.002, **options}
            ),
            **own,
        )
        return watch(session)


def answer(
    status: int = 200,
    content: Any = None,
    *,
    sample: str | None = None,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> Handler:
    """Return a handler that always sends the same response: JSON, a sample, or raw bytes."""
    if sample is not None:
        body = (SAMPLES / f"{sample}.json").read_bytes()
    elif body is None:
        body = b"" if content is None else json.dumps(content).encode()
    head = {"Content-Type": "application/json", **(headers or {})}

    async def handle(_: web.Request) -> web.StreamResponse:
        return web.Response(status=status, body=body, headers=head)

    return handle


def wire(data: bytes) -> Handler:
    """Return a handler that writes these bytes to the socket and hangs up."""

    async def handle(request: web.Request) -> web.StreamResponse:
        transport = request.transport
        assert transport is not None
        transport.write(data)
        transport.close()
        return web.Response()

    return handle


def hang_up() -> Handler:
    """Return a handler that closes the connection without a byte."""
    return wire(b"")


def one_after_the_other(*handlers: Handler) -> Handler:
    """Return a handler that uses each of these handlers once, and then repeats the last one."""
    left = list(handlers)

    async def handle(request: web.Request) -> web.StreamResponse:
        return await (left.pop(0) if len(left) > 1 else left[0])(request)

    return handle


CAPTION = answer(sample="captioning")


def after(event: asyncio.Event, handler: Handler = CAPTION) -> Handler:
    """Return a handler that lets another one answer once an event is set."""

    async def handle(request: web.Request) -> web.StreamResponse:
        await event.wait()
        return await handler(request)

    return handle


async def never_answer(_: web.Request) -> web.StreamResponse:
    """Hold a request for longer than a test takes."""
    await asyncio.sleep(300)
    return web.Response()


async def until(condition: Callable[[], object], *, seconds: float = 30.0) -> None:
    """Wait for a condition that real I/O causes. Fail if it does not occur."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true"
        await asyncio.sleep(0.001)


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    """Keep the garbage collector out of a measurement."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def until_still(read: Callable[[], object], *, polls: int = 40) -> None:
    """Wait until a value stays the same for a number of turns of the loop, 5 ms apart.

    Each turn serves the sockets that are ready, so a process that stalls does not seem still.
    """
    before, same = read(), 0
    while same < polls:
        await asyncio.sleep(0.005)
        before, same = read(), same + 1 if read() == before else 0


def have_failed(session: AnalyzeSession, attempts: int) -> bool:
    """Return whether this many attempts were made and none of them is in flight."""
    stats = session.stats
    return stats.attempts == attempts and not stats.permits_in_use


def watch(session: AnalyzeSession) -> AnalyzeSession:
    """Let `wind` wait for the responses of a session that no scripted server opened."""
    _sessions.add(session)
    return session


async def wind(clock: ManualClock, awaitable: Awaitable[Any], *, seconds: float = 40.0) -> Any:
    """Advance a clock, timer by timer, until an awaitable is done.

    Sockets use real time, so responses arrive before the clock moves, unless a handler holds them.
    """
    task = asyncio.ensure_future(awaitable)
    try:
        async with asyncio.timeout(seconds):
            while not task.done():
                await _let_responses_arrive(task)
                if (due := clock.next_at) is not None:
                    await clock.advance(max(0.0, due - clock.now))
                await asyncio.sleep(0.001)
            return await task
    finally:
        task.cancel()


async def _let_responses_arrive(task: asyncio.Future[Any]) -> None:
    before, since = None, time.monotonic()
    while not task.done():
        all_stats = [session.stats for session in _sessions]
        if not any(stats.permits_in_use for stats in all_stats):
            return
        now = [(stats.attempts, stats.permits_in_use) for stats in all_stats]
        if now != before:
            before, since = now, time.monotonic()
        elif time.monotonic() - since > HELD_SECONDS:
            return
        await asyncio.sleep(0.001)


def busy(stats: SessionStats) -> tuple[int, int, int]:
    """Return the counts that must be zero when the session is idle."""
    return stats.in_flight, stats.permits_in_use, stats.waiting


@attrs.define(eq=False)
class Suspensions:
    """Counts how often a coroutine yields to the loop, and cancels it at one of them."""

    cancel_at: int
    late: bool = False
    count: int = 0

    async def drive(self, coroutine: Any) -> Any:
        """Run a coroutine. `late` cancels after the awaited future is done but before the resumption."""
        return await self._step(coroutine)

    @types.coroutine
    def _step(self, coroutine: Any) -> Generator[Any, Any, Any]:
        steps = coroutine.__await__()
        thrown: BaseException | None = None
        while True:
            try:
                awaited = steps.send(None) if thrown is None else steps.throw(thrown)
            except StopIteration as stop:
                return stop.value
            self.count += 1
            if self.count == self.cancel_at:
                task = asyncio.current_task()
                assert task is not None
                if not self.late:
                    task.cancel()
                elif awaited is not None:
                    awaited.add_done_callback(lambda _, task=task: task.cancel())
            try:
                thrown = None
                yield awaited
            except BaseException as error:
                thrown = error


async def cancel_at(number: int, coroutine: Any, *, late: bool) -> bool:
    """Cancel a coroutine at one of its suspensions. Return whether it completed before that one."""
    steps = Suspensions(number, late)
    task = asyncio.create_task(steps.drive(coroutine))
    await asyncio.wait([task], timeout=30)
    assert task.done(), f"the coroutine hangs when cancelled at {number}"
    if task.cancelled():
        return False
    task.result()
    return steps.count < number


async def step_through(
    session: AnalyzeSession,
    build: Any,
    *,
    late: bool,
    most: int = 400,
    idle: Callable[[], bool] | None = None,
) -> int:
    """Cancel at the first suspension, then at the second, and so on until it completes.

    Args:
        session: Must be idle again after each cancellation.
        build: Makes the coroutine to cancel.
        late: As for `Suspensions.drive`.
        most: The number of suspensions within which it must complete.
        idle: Returns whether the session is idle. By default, no permit is used or waited for.
    """
    idle = idle or (lambda: busy(session.stats) == (0, 0, 0))
    for number in range(1, most):
        if await cancel_at(number, build(), late=late):
            return number
        await until(idle)
    raise AssertionError("the coroutine never completed")


@contextlib.contextmanager
def serve_on_thread(service: Any) -> Iterator[Any]:
    """Enter an async context manager on an event loop in another thread, and yield its value."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        value = asyncio.run_coroutine_threadsafe(service.__aenter__(), loop).result()
        try:
            yield value
        finally:
            leaving = service.__aexit__(None, None, None)
            asyncio.run_coroutine_threadsafe(leaving, loop).result()
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def requests_of(count: int, kind: Any) -> Iterable[Any]:
    """Return requests of different sources."""
    return [kind(f"https://example.com/{index}.jpg") for index in range(count)]
