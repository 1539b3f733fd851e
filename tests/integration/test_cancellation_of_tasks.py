"""Cancelled at any suspension, tasks, polls, streams and closes leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web
from scripted import (
    SECRET,
    URL,
    Handler,
    ScriptedServer,
    Suspensions,
    answer,
    busy,
    hang_up,
    requests_of,
    step_through,
    until,
)
from task_support import build_result, connected, count_scheduled, idle, library_tasks, quick, sign

from cloudinary_analyze import AnalyzeError, AnalyzeSession, Captioning, Delivery
from cloudinary_analyze.errors import SessionClosedError
from cloudinary_analyze.ledger import SQLiteLedger

both = pytest.mark.parametrize("late", [False, True])


class Tasks:
    """Accepts every request as a task and delivers its result; every third attempt fails first."""

    def __init__(self, *, troubled: bool = False) -> None:
        self.queue: asyncio.Queue[Delivery] = asyncio.Queue()
        self.count = 0
        self.attempts = 0
        self.troubled = troubled
        self.silent = False
        self.failures: list[Handler] = [
            answer(500),
            answer(429, headers={"Retry-After": "0.001"}),
            hang_up(),
        ]

    async def __call__(self, request: web.Request) -> web.StreamResponse:
        if request.method == "GET":
            task_id = request.path.rpartition("/")[2]
            return await answer(content={"data": {"task_id": task_id, "status": "pending"}})(
                request
            )
        self.attempts += 1
        if self.troubled and self.attempts % 3 == 0:
            return await self.failures[self.attempts // 3 % 3](request)
        self.count += 1
        task_id = f"t{self.count}"
        if not self.silent:
            now = time.time()
            delivery = sign(build_result(task_id), secret=SECRET, at=now, received_at=now)
            self.queue.put_nowait(delivery)
        content = {"data": {"task_id": task_id, "status": "pending"}}
        return await answer(202, content=content)(request)


@contextlib.asynccontextmanager
async def serve(
    *, troubled: bool = False, **options: Any
) -> AsyncIterator[tuple[Tasks, AnalyzeSession]]:
    tasks = Tasks(troubled=troubled)
    async with ScriptedServer(tasks) as server:
        options = {"permits": 2, "attempts": 10, "task_timeout": 10.0, "poll_first": 60} | options
        async with server.session(notifications=tasks.queue, **options) as session:
            await session.submit(Captioning(URL))  # imports and connections
            yield tasks, session


def nothing_is_left(session: AnalyzeSession) -> Callable[[], bool]:
    """Return a check that permits, table and background tasks are as now."""
    before = len(library_tasks())
    return lambda: idle(session) == (0, 0, 0, 0) and len(library_tasks()) <= before


@both
@pytest.mark.parametrize("mode", ["task", "call"])
@pytest.mark.parametrize("troubled", [False, True])
async def test_a_submission_can_be_cancelled_everywhere(
    mode: Any, troubled: bool, late: bool
) -> None:
    """The submission continues to its end, because its handle was not cancelled."""
    handles = []
    async with serve(troubled=troubled) as (_, session):

        async def run() -> None:
            handles.append(session.submit(Captioning(URL), mode="task"))
            await handles[-1].accepted()
            await handles[-1].wait()
            handles.append(session.submit(Captioning(URL), mode=mode))
            await handles[-1]

        idle_again = nothing_is_left(session)
        assert await step_through(session, run, late=late, idle=idle_again) > 2
        await until(lambda: all(handle.done() for handle in handles))
        for handle in handles:
            with contextlib.suppress(*([AnalyzeError] if troubled else [])):
                handle.result()


@both
async def test_a_call_answered_by_a_task_can_be_cancelled_everywhere(late: bool) -> None:
    async with serve() as (_, session):

        async def run() -> None:
            await session.analyze(Captioning(URL))

        idle_again = nothing_is_left(session)
        assert await step_through(session, run, late=late, idle=idle_again) > 2
        await session.analyze(Captioning(URL))


@both
@pytest.mark.parametrize("mode", ["task", "call"])
@pytest.mark.parametrize("with_ledger", [False, True])
async def test_map_of_tasks_and_with_a_ledger_can_be_cancelled_everywhere(
    mode: Any, with_ledger: bool, late: bool, tmp_path: Path
) -> None:
    count = 0
    async with serve(troubled=True) as (_, session), contextlib.AsyncExitStack() as stack:
        ledgers = []

        async def run() -> None:
            nonlocal count
            count += 1
            ledger = SQLiteLedger(tmp_path / str(count)) if with_ledger else None
            if ledger is not None:
                ledgers.append(ledger)
                stack.push_async_callback(ledger.aclose)
            requests = requests_of(4, Captioning)
            seen = 0
            async with session.map(requests, mode=mode, window=3, ledger=ledger) as stream:
                async for outcome in stream:
                    outcome.unwrap()
                    seen += 1
            assert seen == 4

        idle_again = nothing_is_left(session)
        assert await step_through(session, run, late=late, idle=idle_again) > 3
        for ledger in ledgers:
            await ledger.aclose()


async def test_a_stream_closed_twice_withdraws_the_submission_in_flight(tmp_path: Path) -> None:
    """The first close waits for the 202, to record the task; the second does not."""
    reported: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
    holding, release = asyncio.Event(), asyncio.Event()

    async def hold(request: web.Request) -> web.StreamResponse:
        holding.set()
        await release.wait()
        return await answer(400)(request)

    async with ScriptedServer(hold) as server, SQLiteLedger(tmp_path / "ledger") as ledger:
        async with server.session(notifications=asyncio.Queue()) as session:
            stream = session.map(requests_of(1, Captioning), mode="task", ledger=ledger)
            consumer = asyncio.ensure_future(anext(aiter(stream)))
            await holding.wait()
            closings = []
            for _ in range(2):
                closings.append(asyncio.create_task(stream.aclose()))
                for _ in range(5):
                    await asyncio.sleep(0)
            _, hanging = await asyncio.wait(closings, timeout=30)
            assert not hanging
            consumer.cancel()
            await asyncio.wait([consumer])
            await until(lambda: idle(session) == (0, 0, 0, 0))
            assert not release.is_set()  # the submission was withdrawn, not answered
            release.set()
        gc.collect()
    assert not reported


@both
async def test_a_busy_close_can_be_cancelled_everywhere(
    late: bool,
) -> None:
    """Whenever a close is cancelled, a second one completes it, and every waiter ends."""
    for number in range(1, 80):
        tasks = Tasks()
        async with ScriptedServer(tasks) as server:
            session = await server.session(
                notifications=tasks.queue, permits=2, poll_first=60
            ).__aenter__()
            tasks.silent = True
            handles = [session.submit(Captioning(URL)) for _ in range(3)]
            await handles[0].accepted()
            waiters = [asyncio.create_task(_await(handle)) for handle in handles]
            calls = [
                asyncio.create_task(session.analyze(request))
                for request in requests_of(3, Captioning)
            ]

            async def consume(session: AnalyzeSession = session) -> None:
                async with session.map(requests_of(4, Captioning), mode="task") as stream:
                    async for _ in stream:
                        pass

            calls.append(asyncio.create_task(consume()))
            await asyncio.sleep(0)
            steps = Suspensions(number, late)
            closing = asyncio.create_task(steps.drive(session.aclose(drain=0.01)))
            await asyncio.wait([closing], timeout=30)
            assert closing.done(), f"the close hangs when cancelled at {number}"
            await asyncio.wait_for(session.aclose(), 30)
            ended, hanging = await asyncio.wait([*waiters, *calls], timeout=30)
            assert not hanging, f"waiters hang when the close is cancelled at {number}"
            for task in ended:
                assert not task.cancelled()
                assert isinstance(task.exception(), AnalyzeError | None)
            assert all(isinstance(handle.exception(), SessionClosedError) for handle in handles)
            assert idle(session) == (0, 0, 0, 0)
            await until(lambda: not library_tasks())
            if not closing.cancelled() and steps.count < number:
                return
    raise AssertionError("it never completed")


async def _await(handle: Any) -> object:
    return await handle


@both
async def test_a_cancelled_background_submission_is_ambiguous(late: bool) -> None:
    """A waiter learns that the task may have been accepted."""
    async with connected(quick(permits=1), task_seconds=0.01) as (_, session):
        tracker = session._connection.tracker
        caller, handles = tracker.caller, []
        for number in range(1, 60):
            steps = Suspensions(number, late)
            tracker.caller = SimpleNamespace(
                analyze=lambda *args, steps=steps, **options: steps.drive(
                    caller.analyze(*args, **options)
                )
            )
            handles.append(tracker.submit(Captioning(URL), as_task=True, deadline=None))
            (call,) = tracker._calls.values()
            await asyncio.wait([call], timeout=30)
            tracker.caller = caller
            await until(lambda: handles[-1].done() and idle(session) == (0, 0, 0, 0))
            error = handles[-1].exception()
            if error is not None:
                assert isinstance(error, SessionClosedError)
                assert error.ambiguous
            assert len(tracker.table.dues) == 0
            assert not tracker._calls
            if steps.count < number:
                break
        assert number > 2
        assert handles[-1].exception() is None


@both
async def test_a_call_answered_by_polls_can_be_cancelled_everywhere(late: bool) -> None:
    """Nothing else can wait for such a task, so it is dropped: no poll and no deadline is left."""
    accepted, polled = [], []

    async def follow(request: web.Request) -> web.StreamResponse:
        if request.method == "GET":
            polled.append(request.path)
            if len(polled) % 2:
                return await answer(content={"data": {"status": "processing"}})(request)
            data = {"status": "completed", "analysis": {"data": {"caption": "a cat"}}}
            return await answer(content={"data": data})(request)
        accepted.append(f"t{len(accepted)}")
        return await answer(202, {"data": {"task_id": accepted[-1]}})(request)

    async with ScriptedServer(follow) as server:
        async with server.session(poll_first=0.01, poll_longest=0.02) as session:
            tracker = session._connection.tracker

            def nothing_is_polled() -> bool:
                polls = tracker.caller.attempts.poll_queue.admission.in_use
                left = [e for e in tracker.table.pending.values() if e.waits or e.poll_at]
                return not (polls or count_scheduled(tracker) or left or tracker._calls) and (
                    busy(session.stats) == (0, 0, 0)
                )

            call = partial(session.analyze, Captioning(URL))
            assert await step_through(session, call, late=late, idle=nothing_is_polled) > 2


@both
async def test_polls_can_be_cancelled_everywhere(late: bool) -> None:
    """After a cancelled wait without a source, the next wait polls as usual."""
    async with connected(quick(poll_first=0.01), task_seconds=0.02) as (_, session):
        queue = session._connection.tracker.caller.attempts.poll_queue

        async def poll() -> None:
            task_id = await session.submit(Captioning(URL)).accepted()
            await session.task(task_id, Captioning).wait()
            await session.task_status(task_id)

        def nothing_is_polled() -> bool:
            polls = queue.admission.in_use + queue.waiting
            return idle(session) == (0, 0, 0, 0) and not polls

        assert await step_through(session, poll, late=late, idle=nothing_is_polled) > 3


async def test_a_cancelled_waiter_among_thousands_disturbs_no_other() -> None:
    async with connected(task_seconds=0.3) as (_, session):
        task = session.submit(Captioning(URL))
        waiters = [asyncio.ensure_future(task) for _ in range(2000)]
        await task.accepted()
        for waiter in waiters[::2]:
            waiter.cancel()
        outcomes = await asyncio.gather(*waiters, return_exceptions=True)
        assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes[::2])
        assert all(outcome.analysis.caption for outcome in outcomes[1::2])
