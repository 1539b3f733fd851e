"""Helpers for task tests: an emulator connected to a session, deliveries, quick settings."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import attrs

from cloudinary_analyze import (
    AnalyzeSession,
    Captioning,
    Credentials,
    Delivery,
    Settings,
)
from cloudinary_analyze._http.quota import Quota
from cloudinary_analyze._meter import Meter
from cloudinary_analyze._tasks.tracker import Tracker
from cloudinary_analyze._wire.protocol import Accepted
from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.notifications import QueueSource
from cloudinary_analyze.responses import TaskStatus
from cloudinary_analyze.testing import ManualClock, build_notification, sign_notification

SECRET = "unit-secret"
NOW = 1_790_000_000.0
URL = "https://example.com/a.jpg"


def quick(**options: Any) -> Settings:
    """Return settings whose waits are short in real time."""
    return Settings(
        **{
            "poll_first": 0.05,
            "poll_longest": 0.5,
            "polls_per_second": 1000,
            "result_grace": 0.3,
            "failure_grace": 0.2,
            "backoff_first": 0.01,
            "backoff_max": 0.02,
            **options,
        }
    )


def build_result(task_id: str, caption: str = "a cat", **fields: Any) -> bytes:
    """Return the body of a notification that brings a caption."""
    analysis = {"data": {"caption": caption}, "model_version": 4}
    content = json.loads(build_notification(task_id, Captioning(URL), analysis))
    del content["limits"]
    return json.dumps(content | fields).encode()


def build_failure(task_id: str, message: str = "it is not an image") -> bytes:
    """Return the body of a notification that brings a failure."""
    return build_notification(task_id, Captioning, status=400, code="MA_00003", message=message)


def sign(
    body: bytes,
    *,
    secret: str = SECRET,
    at: float = NOW,
    received_at: float | None = NOW,
) -> Delivery:
    """Return a delivery that was signed at an instant."""
    headers = sign_notification(body, Credentials("demo", "1", secret), at=at)
    return Delivery(body, headers, received_at=received_at)


@contextlib.asynccontextmanager
async def connected(
    settings: Settings | None = None, *, session_options: Any = None, **emulator_options: Any
) -> AsyncIterator[tuple[Emulator, AnalyzeSession]]:
    """Run an emulator whose notifications go into the queue of an open session."""
    queue: asyncio.Queue[Delivery] = asyncio.Queue()
    async with Emulator(on_delivery=queue.put_nowait, **emulator_options) as emulator:
        async with AnalyzeSession(
            Credentials.from_url(emulator.cloudinary_url),
            settings=settings or quick(),
            notifications=queue,
            **(session_options or {}),
        ) as session:
            yield emulator, session


@contextlib.asynccontextmanager
async def unconnected(
    settings: Settings | None = None, *, session_options: Any = None, **emulator_options: Any
) -> AsyncIterator[tuple[Emulator, AnalyzeSession]]:
    """Run an emulator and an open session that receives no notifications."""
    async with Emulator(**emulator_options) as emulator:
        async with AnalyzeSession(
            Credentials.from_url(emulator.cloudinary_url),
            settings=settings or quick(),
            **(session_options or {}),
        ) as session:
            yield emulator, session


def idle(session: AnalyzeSession) -> tuple[int, int, int, int]:
    """Return the counts that must be zero when the session is idle."""
    stats = session.stats
    return stats.in_flight, stats.permits_in_use, stats.waiting, stats.pending


def library_tasks() -> set[asyncio.Task[Any]]:
    """Return the asyncio tasks that run a coroutine of the package's client side."""
    found = set()
    for task in asyncio.all_tasks():
        code = getattr(task.get_coro(), "cr_code", None)
        name = code.co_filename if code is not None else ""
        if "cloudinary_analyze" in name and "emulator" not in name:
            found.add(task)
    return found


@attrs.define(eq=False)
class Service:
    """Replaces the calls of a session, so that only its clock measures time.

    Attributes:
        state: Returns the status of a task: a state, a `TaskStatus`, or an error to raise.
        repeat: Returns the response of an analyze call without a task.
        polls: The (time, task id) of each poll, in order.
    """

    clock: ManualClock
    state: Callable[[str], Any] = lambda _: "pending"
    repeat: Any = None
    polls: list[tuple[float, str]] = attrs.field(factory=list)
    calls: int = 0
    on_the_wire: int = 0
    most_on_the_wire: int = 0
    hold: asyncio.Event | None = None
    settings: Settings = attrs.field(factory=Settings)
    quota: Quota = attrs.field(init=False)
    meter: Meter = attrs.field(factory=Meter)

    def __attrs_post_init__(self) -> None:
        self.quota = Quota(self.clock)

    async def analyze(self, request: Any, *, as_task: bool = False, **_: Any) -> Any:
        self.calls += 1
        number = self.calls
        await asyncio.sleep(0)
        if as_task:
            return Accepted(f"t{number}")
        if isinstance(self.repeat, Exception):
            raise self.repeat
        return self.repeat

    async def get_task_status(self, task_id: str, *, attempts: int | None = None) -> TaskStatus:
        assert attempts == 1  # only the poller's schedule repeats a poll
        self.polls.append((self.clock.now, task_id))
        self.on_the_wire += 1
        self.most_on_the_wire = max(self.most_on_the_wire, self.on_the_wire)
        try:
            if self.hold is not None:
                await self.hold.wait()
            else:
                await asyncio.sleep(0)
        finally:
            self.on_the_wire -= 1
        state = self.state(task_id)
        if isinstance(state, Exception):
            raise state
        return state if isinstance(state, TaskStatus) else TaskStatus(task_id, state)

    def when(self, task_id: str = "t1") -> list[float]:
        """Return when a task was polled."""
        return [at for at, asked in self.polls if asked == task_id]

    def per_task(self) -> Counter[str]:
        """Return how often each task was polled."""
        return Counter(asked for _, asked in self.polls)


@contextlib.asynccontextmanager
async def resolving(
    service: Service, *, source: Any = True, **settings: Any
) -> AsyncIterator[Tracker]:
    """Run a tracker over a fake service, with a queue, another source, or no source."""
    service.settings = Settings(**settings)
    if source is True:
        source = QueueSource(asyncio.Queue())
    tracker = Tracker.start(
        service,  # type: ignore[arg-type]
        Credentials("demo", "key", SECRET),
        source=source,
    )
    try:
        yield tracker
    finally:
        await tracker.stop()


_held: list[Any] = []


def hold(task: Any) -> Any:
    """Keep a handle alive and return its wait."""
    _held.append(task)
    return task._wait


def count_scheduled(tracker: Tracker) -> int:
    """Return the number of tasks whose poll is scheduled."""
    return len(tracker.poller._known) + len(tracker.poller._unknown)


def attach(tracker: Tracker, task_id: str, *, request: Any = None, **options: Any) -> Any:
    """Attach to a captioning task and return its wait."""
    return hold(tracker.attach(task_id, request or Captioning, **options))


async def submit(tracker: Tracker, *, deadline: float | None = None) -> Any:
    """Submit a task and return its wait once it was accepted."""
    task = tracker.submit(Captioning(URL), as_task=True, deadline=deadline)
    wait = hold(task)
    while wait.entry.task_id is None and wait.answer is None:
        await asyncio.sleep(0)
    return wait
