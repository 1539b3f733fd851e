"""The end of a session or of its source fails any number of tasks without blocking the loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from scripted import ScriptedServer, after, no_collector, until
from task_support import SECRET, build_result, library_tasks
from test_deadlines import LOOPS, run

from cloudinary_analyze import (
    AnalysisTask,
    AnalyzeSession,
    Captioning,
    CaptioningAnalysis,
    Credentials,
    Delivery,
    NotificationSourceError,
    SessionClosedError,
    Settings,
)
from cloudinary_analyze.webhooks import parse_notification

MANY = 50
REQUEST = Captioning("https://example.com/a.jpg")
LONGEST_STALL = 0.05  # seconds of CPU; in one turn, 100,000 take eight times as long


@pytest.fixture
def _one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """End one task in each turn of the loop, so that tests can act in between."""
    monkeypatch.setattr("cloudinary_analyze._tasks.tracker.SLICE", -1.0)


one_by_one = pytest.mark.usefixtures("_one_by_one")


class Source:
    """Delivers nothing, and ends on request."""

    def __init__(self) -> None:
        self.over = asyncio.Event()

    async def listen(self) -> AsyncIterator[Delivery]:
        await self.over.wait()
        for delivery in ():
            yield delivery


def build_session(source: Source) -> AnalyzeSession:
    settings = Settings(host="http://127.0.0.1:9", poll_first=3000, poll_longest=3000)
    credentials = Credentials("demo", "key", SECRET)
    return AnalyzeSession(credentials, settings=settings, notifications=source)


def accept(session: AnalyzeSession, count: int) -> list[AnalysisTask[CaptioningAnalysis]]:
    """Return handles on a number of tasks, as if the service had accepted them."""
    tracker = session._opened().tracker
    deadline = tracker.clock.monotonic() + 3600
    return [
        tracker.attach(
            f"t{index}",
            REQUEST,
            just_accepted=True,
            deadline=deadline,
        )
        for index in range(count)
    ]


def count_done(tasks: list[AnalysisTask[Any]]) -> int:
    return sum(task.done() for task in tasks)


async def until_some_ended(tasks: list[AnalysisTask[Any]]) -> None:
    while not count_done(tasks):
        await asyncio.sleep(0)
    assert count_done(tasks) < len(tasks) - 10


def check_ended(tasks: list[AnalysisTask[Any]], kind: type[Exception]) -> None:
    for index, task in enumerate(tasks):
        error = task.exception()
        assert isinstance(error, kind)
        assert f"t{index}" == getattr(error, "task_id", None)


async def measure_stall(ending: asyncio.Task[None]) -> float:
    """Return the CPU seconds of the longest turn of the loop until a task is done."""
    longest, last = 0.0, time.thread_time()
    while not ending.done():
        await asyncio.sleep(0)
        now = time.thread_time()
        longest, last = max(longest, now - last), now
    return longest


@pytest.mark.slow
@pytest.mark.parametrize(("how", "awaited"), [("close", True), ("source", False)])
async def test_100_000_tasks_end_in_short_turns(how: str, awaited: bool) -> None:
    source = Source()
    async with build_session(source) as session:
        tasks = accept(session, 100_000)
        waiters = [asyncio.ensure_future(task) for task in tasks] if awaited else []
        await asyncio.sleep(0)

        async def end() -> None:
            if how == "close":
                await session.aclose()
                return
            source.over.set()
            while not tasks[-1].done():
                await asyncio.sleep(0)

        with no_collector():
            assert await measure_stall(asyncio.create_task(end())) < LONGEST_STALL
        check_ended(tasks, SessionClosedError if how == "close" else NotificationSourceError)
        errors = await asyncio.gather(*waiters, return_exceptions=True)
        assert all(isinstance(error, Exception) for error in errors)
        assert session.stats.pending == 0


@pytest.mark.slow
async def test_20_000_queued_submissions_end_in_short_turns() -> None:
    answered = asyncio.Event()
    patient = {"connect_timeout": 300, "read_timeout": 300}  # on a busy machine, too
    async with ScriptedServer(after(answered)) as server, server.session(**patient) as session:
        tasks = [session.submit(REQUEST) for _ in range(20_000)]
        await until(lambda: session.stats.waiting == 20_000 - 64, seconds=120)

        async def end() -> None:
            closing = asyncio.create_task(session.aclose())
            await until(lambda: session.stats.waiting == 0, seconds=120)
            answered.set()
            await closing

        with no_collector():
            assert await measure_stall(asyncio.create_task(end())) < LONGEST_STALL
        errors = [task.exception() for task in tasks]
        assert errors.count(None) == 64
        assert {type(error) for error in errors} == {type(None), SessionClosedError}


@one_by_one
@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("turns", [0, 1, 2, 3, 5])
def test_a_cancelled_close_ends_every_handle(loop: str, turns: int) -> None:
    async def main() -> None:
        session = await build_session(Source()).__aenter__()
        tasks = accept(session, MANY)
        closing = asyncio.create_task(session.aclose())
        await until_some_ended(tasks)
        for _ in range(turns):
            await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        assert count_done(tasks) < MANY, "it waited"
        await session.aclose()
        check_ended(tasks, SessionClosedError)
        assert not library_tasks()

    run(loop, main)


@one_by_one
async def test_a_close_cancelled_at_its_beginning_ends_every_handle() -> None:
    session = await build_session(Source()).__aenter__()
    tasks = accept(session, MANY)
    closing = asyncio.create_task(session.aclose())
    await asyncio.sleep(0)
    closing.cancel()
    await asyncio.wait([closing])
    await until(lambda: count_done(tasks) == MANY)
    check_ended(tasks, SessionClosedError)
    assert not library_tasks()


@one_by_one
async def test_a_second_close_waits_until_every_handle_ended() -> None:
    session = await build_session(Source()).__aenter__()
    tasks = accept(session, MANY)
    first = asyncio.create_task(session.aclose())
    await until_some_ended(tasks)
    await session.aclose()
    assert count_done(tasks) == MANY
    await first
    check_ended(tasks, SessionClosedError)


@one_by_one
async def test_a_loop_that_ends_meanwhile_ends_every_handle() -> None:
    """`asyncio.run` cancels what is left of a program that was interrupted."""
    tasks: list[AnalysisTask[Any]] = []

    async def main() -> None:
        session = await build_session(Source()).__aenter__()
        tasks.extend(accept(session, MANY))
        closing = asyncio.create_task(session.aclose())
        await until_some_ended(tasks)
        closing.cancel()

    await asyncio.to_thread(asyncio.run, main())
    check_ended(tasks, SessionClosedError)


@one_by_one
@pytest.mark.parametrize("loop", LOOPS)
def test_handles_made_while_the_source_ends_end_too(loop: str) -> None:
    async def main() -> None:
        source = Source()
        async with build_session(source) as session:
            tasks = accept(session, MANY)
            source.over.set()
            await until_some_ended(tasks)
            made = [
                session.task("t0", Captioning),  # ended
                session.task(f"t{MANY - 1}", Captioning),  # still pending
                session.task("new", Captioning),
                session.submit(REQUEST),
            ]
            assert [task.done() for task in made] == [True, False, True, True]
            for task in made:
                with pytest.raises(NotificationSourceError):
                    await task
            await until(lambda: count_done(tasks) == MANY)
            check_ended(tasks, NotificationSourceError)

    run(loop, main)


@one_by_one
async def test_handles_that_end_meanwhile_keep_their_outcome() -> None:
    source = Source()
    async with build_session(source) as session:
        tasks = accept(session, MANY)
        source.over.set()
        await until_some_ended(tasks)
        tasks[-1].abandon()
        cancelled = asyncio.ensure_future(tasks[-2])
        await asyncio.sleep(0)
        cancelled.cancel()
        body = build_result(f"t{MANY - 3}")
        session._opened().tracker.deliver(parse_notification(body), body)
        assert (await tasks[-3]).analysis.caption == "a cat"
        assert isinstance(tasks[-1].exception(), TimeoutError)
        again = session.task(f"t{MANY - 1}", Captioning)
        assert isinstance(again.exception(), NotificationSourceError)
        await asyncio.wait([cancelled])
        assert cancelled.cancelled()
        del tasks[-3:]
        await until(lambda: count_done(tasks) == len(tasks))
        check_ended(tasks, NotificationSourceError)


@one_by_one
async def test_a_close_while_the_source_ends_waits_for_it() -> None:
    source = Source()
    async with build_session(source) as session:
        tasks = accept(session, MANY)
        source.over.set()
        await until_some_ended(tasks)
        await session.aclose()
        assert count_done(tasks) == MANY
        errors = {type(task.exception()) for task in tasks}
        assert errors == {NotificationSourceError, SessionClosedError}
        assert not library_tasks()
