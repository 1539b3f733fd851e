"""One session of the sweep: a server with random faults, and users who leave at random.

A seed decides everything but the exact timing. Reproduce a session with::

    python tests/chaos/sweep_support.py SEED [asyncio|uvloop|eager]
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import io
import json
import random
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import attrs

sys.path.insert(0, str(Path(__file__).parent))
if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))

from faulty_proxy import AFTER, BEFORE, HARMLESS, OF_CONNECTIONS, FaultyProxy, ProxyPlan
from task_support import SECRET, build_failure, build_result, library_tasks, sign

from cloudinary_analyze import (
    AnalysisTask,
    AnalyzeError,
    AnalyzeSession,
    Captioning,
    Coco,
    Credentials,
    Delivery,
    Settings,
)
from cloudinary_analyze.ledger import SQLiteLedger

SAMPLES = Path(__file__).parent.parent / "samples"
BODIES = {name: (SAMPLES / f"{name}.json").read_bytes() for name in ("captioning", "coco")}
LOOPS = ["asyncio", "uvloop", *(["eager"] if sys.version_info >= (3, 12) else [])]
PATIENCE = 60.0
"""Seconds of real time after the close. What has not ended by then hangs, also on a busy machine."""


@attrs.define(eq=False)
class ChaosServer:
    """Speaks HTTP/1.1 on a raw socket, so that it can also stop anywhere in a response.

    It starts no asyncio tasks, so every task that is left belongs to the client.
    """

    chance: random.Random
    trouble: float
    deliver: Callable[[Delivery], None]
    tasks: dict[str, str] = attrs.field(factory=dict)
    peers: set[Peer] = attrs.field(factory=set)
    timers: list[asyncio.TimerHandle] = attrs.field(factory=list)
    closed: bool = False

    def later(self, seconds: float, function: Callable[..., object], *arguments: Any) -> None:
        if not self.closed:
            loop = asyncio.get_running_loop()
            self.timers.append(loop.call_later(seconds, function, *arguments))

    def close(self) -> None:
        self.closed = True
        for timer in self.timers:
            timer.cancel()
        for peer in list(self.peers):
            peer.transport.abort()

    def handle(self, peer: Peer, method: str, path: str, body: bytes) -> None:
        if method == "POST":
            status, content = self.answer_call(path, json.loads(body))
        else:
            status, content = self.answer_poll(path.rpartition("/")[2])
        if self.chance.random() < self.trouble:
            self.misbehave(peer, status, content)
        else:
            self.later(self.chance.choice((0, 0, 0.002, 0.01)), peer.write, status, content)

    def answer_call(self, path: str, request: dict[str, Any]) -> tuple[int, bytes]:
        name = "coco" if path.endswith("coco") else "captioning"
        if not request.get("async") and self.chance.random() > 0.05:
            return 200, BODIES[name]
        task_id = f"t{len(self.tasks)}"
        self.tasks[task_id] = self.chance.choice(("completed",) * 4 + ("failed", "pending"))
        state = self.tasks[task_id]
        if state != "pending" and self.chance.random() < 0.85:
            build = build_result if state == "completed" else build_failure
            for _ in range(self.chance.choice((1, 1, 1, 2))):
                delay = self.chance.choice((0, 0.001, 0.02, 0.1))
                forged = self.chance.random() < 0.05
                now = time.time()
                delivery = sign(
                    build(task_id), at=now, received_at=now, secret="x" if forged else SECRET
                )
                if delay:
                    self.later(delay, self.deliver, delivery)
                else:
                    self.deliver(delivery)
        return 202, json.dumps({"data": {"task_id": task_id, "status": "pending"}}).encode()

    def answer_poll(self, task_id: str) -> tuple[int, bytes]:
        state = self.tasks.get(task_id)
        if state is None:
            return 404, b'{"error": {"code": "MA_00000", "message": "not found"}}'
        return 200, json.dumps({"data": {"task_id": task_id, "status": state}}).encode()

    def misbehave(self, peer: Peer, status: int, content: bytes) -> None:
        seconds = self.chance.choice((b"0", b"0.01", b"0.03"))
        wait = self.chance.choice((b"", b"Retry-After: " + seconds + b"\r\n"))
        half = peer.build(status, content)[: 100 + len(content) // 2]
        error = b'{"error": {"code": "x", "message": "no"}}'
        match self.chance.randrange(14):
            case 0 | 1 | 2:
                peer.write(429, error, wait)
            case 3 | 4:
                peer.write(503, error, wait)
            case 5:
                peer.write(self.chance.choice((500, 502, 504)), b"<html>")
            case 6:
                peer.transport.abort()
            case 7:
                peer.transport.close()
            case 8:
                peer.transport.write(half)
                peer.transport.close()
            case 9:
                peer.transport.write(half)  # the rest never follows: a stall in the middle
            case 10:
                pass  # a stall before the first byte
            case 11:
                self.later(0.05, peer.write, status, content)
            case 12:
                peer.write(200, content[: len(content) // 2])
            case 13:
                peer.write(self.chance.choice((400, 401, 403, 404, 418)), error)


class Peer(asyncio.Protocol):
    """A connection to the server: one request after the other."""

    transport: asyncio.Transport

    def __init__(self, server: ChaosServer) -> None:
        self.server = server
        self.received = b""

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.server.peers.add(self)

    def connection_lost(self, error: Exception | None) -> None:
        self.server.peers.discard(self)

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, end, rest = self.received.partition(b"\r\n\r\n")
        if not end:
            return
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (x.partition(": ") for x in lines)}
        length = int(headers.get("content-length", 0))
        if len(rest) < length:
            return
        self.received = rest[length:]
        method, path, _ = first.split(" ", 2)
        self.server.handle(self, method, path, rest[:length])

    def build(self, status: int, content: bytes, extra: bytes = b"") -> bytes:
        return (
            b"HTTP/1.1 %d X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
            b"%b\r\n%b" % (status, len(content), extra, content)
        )

    def write(self, status: int, content: bytes, extra: bytes = b"") -> None:
        if not self.transport.is_closing():
            self.transport.write(self.build(status, content, extra))


class InputError(Exception):
    """An error of the user's code."""


@attrs.define(eq=False)
class Users:
    """Random actions of an application with a session."""

    session: AnalyzeSession
    chance: random.Random
    ledger: SQLiteLedger
    handles: list[AnalysisTask[Any]] = attrs.field(factory=list)
    futures: list[asyncio.Future[Any]] = attrs.field(factory=list)
    events_left: int = 0
    hurry: asyncio.Event = attrs.field(factory=asyncio.Event)
    interrupt: Callable[[], object] = bool

    def see(self, event: object) -> None:
        """Cancel someone at an event, and close soon after another: in the same turn of the loop."""
        self.events_left -= 1
        if self.events_left == 3:
            self.interrupt()
        if self.events_left == 0:
            self.hurry.set()

    def build_request(self) -> Any:
        # few sources, so that requests are equal now and then
        kind = self.chance.choice((Captioning, Coco))
        return kind(f"https://example.com/{self.chance.randrange(60)}.jpg")

    def choose_timeout(self) -> float | None:
        return self.chance.choice((None, None, 0.0, 0.01, 0.1, 1.0))

    def submit(self) -> AnalysisTask[Any]:
        mode = self.chance.choice(("auto", "task", "call"))
        handle = self.session.submit(self.build_request(), mode=mode, timeout=self.choose_timeout())
        self.handles.append(handle)
        return handle

    def choose(self) -> Coroutine[Any, Any, object]:
        chosen = self.chance.choice(
            [
                *(self.analyze, self.analyze_all, self.map, self.map, self.ask_for_status),
                *(self.await_task, self.wait_in_many_ways, self.re_attach, self.submit_and_forget),
            ]
        )
        return chosen()

    async def analyze(self) -> None:
        for _ in range(self.chance.randrange(1, 4)):
            with contextlib.suppress(AnalyzeError):
                await self.session.analyze(self.build_request(), timeout=self.choose_timeout())

    async def await_task(self) -> None:
        handle = self.submit()
        handle.add_done_callback(lambda _: None)
        with contextlib.suppress(AnalyzeError):
            await handle.accepted()
        await handle

    async def wait_in_many_ways(self) -> None:
        handles = [self.submit() for _ in range(self.chance.randrange(1, 5))]
        match self.chance.randrange(5):
            case 0:
                await asyncio.gather(*handles, return_exceptions=True)
            case 1:
                futures = [handle.as_future() for handle in handles]
                self.futures += futures
                await asyncio.wait(futures)
            case 2:
                await asyncio.wait_for(handles[0], self.chance.choice((0.001, 0.05, 5)))
            case 3:
                for done in asyncio.as_completed(handles, timeout=5):
                    with contextlib.suppress(AnalyzeError):
                        await done
            case 4:
                async with asyncio.timeout(self.chance.choice((0.001, 0.05, 5))):
                    await handles[0].wait()

    async def re_attach(self) -> None:
        handle = self.submit()
        task_id = await handle.accepted() or "unknown"
        if self.chance.random() < 0.3:
            handle.abandon()
        kind = self.chance.choice((Captioning, Coco))
        again = self.session.task(task_id, kind, timeout=self.choose_timeout())
        self.handles.append(again)
        await asyncio.gather(again, handle, return_exceptions=True)

    async def submit_and_forget(self) -> None:
        for _ in range(self.chance.randrange(1, 6)):
            self.submit()

    async def map(self) -> None:
        count = self.chance.choice((0, 1, 10, 60))
        leave_at = self.chance.choice((None, None, 3))
        ledger = self.chance.choice((None, self.ledger))
        raises = self.chance.choice((None,) * 6 + (InputError, asyncio.CancelledError))

        async def produce() -> AsyncIterator[Any]:
            for number in range(count):
                if raises is not None and number == count // 2:
                    raise raises
                if number % 7 == 3:
                    await asyncio.sleep(self.chance.choice((0, 0.003)))
                yield self.build_request()

        stream = self.session.map(
            produce(),
            mode=self.chance.choice(("call", "task")),
            window=self.chance.choice((None, 1, 5)),
            ordered=self.chance.random() < 0.5,
            ledger=ledger,
        )
        async with stream:
            seen = 0
            async for _ in stream:
                seen += 1
                if seen == leave_at:
                    break

    async def analyze_all(self) -> None:
        await self.session.analyze_all([self.build_request() for _ in range(5)])

    async def ask_for_status(self) -> None:
        await self.session.task_status(self.chance.choice(("t0", "unknown")))


def build_settings(chance: random.Random, host: str) -> Settings:
    read_timeout = chance.choice((0.03, 0.1))
    return Settings(
        host=host,
        permits=chance.choice((1, 2, 8, 64)),
        attempts=chance.choice((1, 2, 4)),
        read_timeout=read_timeout,
        call_timeout=chance.choice((None, read_timeout, 0.2)),
        backoff_first=0.002,
        backoff_max=0.01,
        retry_ambiguous=chance.random() < 0.7,
        poll_first=0.02,
        poll_longest=0.1,
        poll_permits=chance.choice((1, 4)),
        polls_per_second=500,
        result_grace=chance.choice((0.0, 0.05)),
        failure_grace=chance.choice((0.0, 0.05)),
        on_missing_result=chance.choice(("raise", "analyze")),
        task_timeout=chance.choice((read_timeout, 0.2, 0.5)),
        answered_seconds=chance.choice((0.0, 0.05, 10)),
        answered_count=chance.choice((2, 1000)),
    )


async def end_all(tasks: list[asyncio.Task[Any]], what: str) -> None:
    """Wait until tasks are done; fail with the stacks of those that hang."""
    _, hanging = await asyncio.wait(tasks, timeout=PATIENCE) if tasks else (None, ())
    if hanging:
        stacks = io.StringIO()
        for task in hanging:
            task.print_stack(file=stacks)
        raise AssertionError(f"{what}: {len(hanging)} hang\n{stacks.getvalue()}")


async def run_users(users: Users, chance: random.Random) -> list[asyncio.Task[Any]]:
    """Start users and cancel some of them, until it is time to close."""
    tasks: list[asyncio.Task[Any]] = []
    users.interrupt = lambda: tasks and chance.choice(tasks).cancel()
    for _ in range(chance.randrange(2, 14)):
        tasks.append(asyncio.create_task(users.choose()))
        await asyncio.sleep(chance.choice((0, 0, 0.001, 0.01, 0.03)))
        if chance.random() < 0.3:
            chance.choice(tasks).cancel()
        if users.hurry.is_set():
            break
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(chance.choice((0, 0, 0.02, 0.1))):
            await users.hurry.wait()
    for _ in range(chance.choice((0, 0, 1, 3))):  # tasks that never take a step before the close
        users.submit()
        tasks.append(asyncio.create_task(users.choose()))
    return tasks


async def close(session: AnalyzeSession, chance: random.Random) -> None:
    """Close the session once or several times, sequentially or concurrently, with or without patience."""
    drain = chance.choice((0.0, 0.0, 0.1))
    match chance.randrange(4):
        case 0:
            closings = [asyncio.create_task(session.aclose(drain)) for _ in range(2)]
            await end_all(closings, "closing")
        case 1:
            closing = asyncio.create_task(session.aclose(drain))
            await asyncio.sleep(chance.choice((0, 0.001, 0.05)))
            closing.cancel()
            await end_all([closing], "a cancelled close")
            await end_all([asyncio.create_task(session.aclose())], "the second close")
        case 2:
            closing = asyncio.create_task(session.aclose(drain))
            await end_all([closing], "closing")
            closing.result()
        case 3:
            closing = asyncio.create_task(session.__aexit__(None, None, None))
            await end_all([closing], "leaving")
            closing.result()


def check_ending(task: asyncio.Task[Any]) -> None:
    """Check that a task ended with a value, a cancellation, an `AnalyzeError` or a user's error."""
    if task.cancelled():
        assert task.cancelling(), f"cancelled without a reason: {task!r}"
        return
    error = task.exception()
    if error is not None and not isinstance(error, AnalyzeError | TimeoutError | InputError):
        raise AssertionError(f"{task.get_coro()!r} ended with {error!r}") from error


def note_complaint(context: dict[str, Any], complaints: list[str]) -> None:
    # asyncio.as_completed makes a task of each handle, and forgets them when it is cancelled
    if "_wrap_awaitable" not in repr(context.get("future")):
        complaints.append(repr(context))


async def live(seed: int, folder: Path, complaints: list[str]) -> None:
    """Open a session, run users on it, close it, and check that nothing is left."""
    chance = random.Random(seed)
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _, context: note_complaint(context, complaints))
    queue: asyncio.Queue[Delivery] = asyncio.Queue()
    server = ChaosServer(
        random.Random(seed + 1), chance.choice((0, 0.1, 0.4, 0.4, 1)), queue.put_nowait
    )
    listening = await loop.create_server(lambda: Peer(server), "127.0.0.1", 0)
    # in half of the sessions, connections also fail
    faults = dict.fromkeys((*BEFORE, *AFTER, *HARMLESS, *OF_CONNECTIONS), 0.03 * (seed // 2 % 2))
    proxy = FaultyProxy(listening.sockets[0].getsockname()[1], ProxyPlan(seed=seed, faults=faults))
    await proxy.__aenter__()
    with_source = chance.random() < 0.8
    session = AnalyzeSession(
        Credentials("demo", "key", SECRET),
        settings=build_settings(chance, f"http://127.0.0.1:{proxy.port}"),
        notifications=queue if with_source else None,
        on_event=lambda event: users.see(event),  # noqa: PLW0108 -- made below
    )
    try:
        async with SQLiteLedger(folder / "ledger") as ledger:
            await session.__aenter__()
            users = Users(session, chance, ledger, events_left=chance.randrange(60))
            tasks = await run_users(users, chance)
            await close(session, chance)
            await end_all(tasks, "users")
            for task in tasks:
                check_ending(task)
            for handle in [*users.handles, *users.futures]:
                assert handle.done(), f"{handle!r} never ended"
                with contextlib.suppress(asyncio.CancelledError):
                    handle.exception()
            stats = session.stats
            counts = (stats.in_flight, stats.permits_in_use, stats.waiting, stats.pending)
            assert counts == (0, 0, 0, 0), stats
            users.handles.clear()
            users.futures.clear()
    finally:
        await proxy.__aexit__()
        server.close()
        listening.close()
        await listening.wait_closed()
    for _ in range(3):  # cancelled tasks end here
        await asyncio.sleep(0)
    assert not library_tasks()
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, left


def find_threads() -> set[threading.Thread]:
    # pycares has one thread for the whole process, from its first resolver on
    return {thread for thread in threading.enumerate() if "_safe_shutdown_" not in thread.name}


def find_descriptors() -> dict[str, str]:
    """Return the open descriptors and the target of each."""
    found = {}
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):  # the descriptor of the listed folder
            found[descriptor.name] = str(descriptor.readlink())
    return found


def run_session(seed: int, kind: str, folder: Path) -> None:
    """Run one session on a new loop; raise if anything hangs, leaks or is reported."""
    _find_loop_factory(kind)().close()  # libuv keeps a pipe from the first loop on
    gc.collect()
    threads, descriptors = find_threads(), find_descriptors()
    complaints: list[str] = []
    with asyncio.Runner(loop_factory=_find_loop_factory(kind)) as runner:
        if kind == "eager":
            runner.get_loop().set_task_factory(asyncio.eager_task_factory)  # type: ignore[attr-defined]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "A task was submitted on a session without")
            runner.run(live(seed, folder, complaints))
        gc.collect()
    gc.collect()
    assert not complaints, complaints
    assert find_threads() <= threads, threading.enumerate()
    deadline = time.monotonic() + 3  # the thread of pycares closes resolvers a little later
    while left := find_descriptors().items() - descriptors.items():
        assert time.monotonic() < deadline, left
        gc.collect()
        time.sleep(0.001)


def _find_loop_factory(kind: str) -> Callable[[], asyncio.AbstractEventLoop]:
    if kind == "uvloop":
        import uvloop

        return uvloop.new_event_loop
    return asyncio.new_event_loop


if __name__ == "__main__":
    warnings.simplefilter("error")
    chosen = sys.argv[2:] or LOOPS
    for loop_kind in chosen:
        with tempfile.TemporaryDirectory() as place:
            began = time.monotonic()
            run_session(int(sys.argv[1]), loop_kind, Path(place))
            print(f"{sys.argv[1]} on {loop_kind}: {time.monotonic() - began:.2f} s")
