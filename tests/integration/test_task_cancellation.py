"""Cancelled at every suspension: permits, table and asyncio tasks are as before."""

import asyncio
from types import SimpleNamespace

import pytest
from scripted import ScriptedServer, Suspensions, answer, busy, until
from task_support import (
    Service,
    build_result,
    connected,
    count_scheduled,
    library_tasks,
    quick,
    resolving,
    sign,
    submit,
)

from cloudinary_analyze import AnalyzeSession, Captioning, Credentials, NotificationSource
from cloudinary_analyze.emulator import Emulator
from cloudinary_analyze.errors import SessionClosedError

NEVER = 3600.0
MOST = 60


def request(index=0):
    return Captioning(f"https://example.com/{index}.jpg")


async def cancel_everywhere(act, check, *, late):
    """Run something again and again, cancelled one suspension later each time."""
    for n in range(1, MOST):
        suspensions = Suspensions(n, late=late)
        task = asyncio.create_task(suspensions.drive(act()))
        await asyncio.wait([task], timeout=30)
        assert task.done(), f"it hangs after a cancel at suspension {n}"
        if not task.cancelled():
            task.result()
        await check(n)
        if suspensions.count < n:
            return n
    raise AssertionError("it never completed")


@pytest.mark.parametrize("late", [False, True])
class TestEverySuspension:
    async def test_of_waiting_for_a_submitted_task(self, late):
        """The handle's waiter leaves. The task is still submitted and answered."""
        async with connected(quick(poll_first=0.01), task_seconds=0.01) as (emulator, session):

            async def act():
                task = session.submit(request())
                await task.accepted()
                await task.wait()
                return await task

            async def check(_):
                await until(lambda: busy(session.stats) == (0, 0, 0))
                await until(lambda: session.stats.pending == 0)
                await until(lambda: not session._connection.tracker._calls)

            # more than one, unless its result arrives with the response
            assert await cancel_everywhere(act, check, late=late) > 1
            assert session.stats.notifications["resolved"] == len(emulator.tasks)

    async def test_of_the_submission_in_the_background(self, late):
        """A waiter learns that the task may have been accepted."""
        async with connected(quick(permits=1), task_seconds=0.01) as (_, session):
            tracker = session._connection.tracker
            analyze = tracker.caller.analyze
            handles = []

            async def act():
                tracker.caller = SimpleNamespace(
                    analyze=lambda *args, **options: driven(analyze(*args, **options))
                )
                handles.append(tracker.submit(request(), as_task=True, deadline=None))
                (call,) = tracker._calls.values()
                await asyncio.wait([call])

            async def check(_):
                tracker.caller = caller
                await until(lambda: busy(session.stats) == (0, 0, 0))
                await until(handles[-1].done)
                await until(lambda: session.stats.pending == 0)
                error = handles[-1].exception()
                if error is not None:
                    assert isinstance(error, SessionClosedError)
                    assert error.ambiguous
                assert len(tracker.table.dues) == 0
                assert not tracker._calls

            caller = tracker.caller
            for n in range(1, MOST):
                suspensions = Suspensions(n, late=late)
                driven = suspensions.drive
                await asyncio.wait_for(act(), 30)
                await check(n)
                if suspensions.count < n:
                    break
            assert n > 2
            assert handles[-1].exception() is None

    async def test_of_an_analyze_that_became_a_task(self, late):
        """Nothing else can wait for such a task, so it is dropped: no poll and no deadline is left."""
        accepted, polled = [], []

        async def follow(http):
            if http.method == "GET":
                polled.append(http.path)
                if len(polled) % 2:
                    return await answer(200, {"data": {"status": "processing"}})(http)
                analysis = {"data": {"caption": "a cat"}}
                return await answer(200, {"data": {"status": "completed", "analysis": analysis}})(
                    http
                )
            accepted.append(f"t{len(accepted)}")
            return await answer(202, {"data": {"task_id": accepted[-1]}})(http)

        async with ScriptedServer(follow) as server:
            async with server.session(poll_first=0.01, poll_longest=0.02) as session:
                tracker = session._connection.tracker

                async def act():
                    return await session.analyze(request())

                async def check(_):
                    await until(lambda: busy(session.stats) == (0, 0, 0))
                    await until(lambda: tracker.caller.attempts.poll_queue.admission.in_use == 0)
                    assert count_scheduled(tracker) == 0
                    pending = tracker.table.pending.values()
                    assert not any(entry.waits or entry.poll_at for entry in pending)
                    assert not tracker._calls

                assert await cancel_everywhere(act, check, late=late) > 2

    async def test_of_polls(self, late):
        """After a cancelled wait without a source, the next wait polls as usual."""
        async with connected(quick(poll_first=0.01), task_seconds=0.02) as (_, session):

            async def act():
                task = session.submit(request())
                task_id = await task.accepted()
                again = session.task(task_id, Captioning)
                await again.wait()
                await session.task_status(task_id)

            async def check(_):
                await until(lambda: busy(session.stats) == (0, 0, 0))
                await until(lambda: session.stats.pending == 0)
                await until(
                    lambda: (
                        session._connection.tracker.caller.attempts.poll_queue.admission.in_use == 0
                    )
                )
                assert session._connection.tracker.caller.attempts.poll_queue.waiting == 0

            assert await cancel_everywhere(act, check, late=late) > 3

    async def test_of_a_mapped_stream_of_tasks(self, late):
        """Leaving the stream withdraws what was not accepted, and waits for nothing more."""
        async with connected(quick(permits=2), task_seconds=0.005) as (_, session):

            async def act():
                count = 0
                async with session.map(map(request, range(6)), mode="task", window=4) as stream:
                    async for outcome in stream:
                        outcome.unwrap()
                        count += 1
                assert count == 6

            async def check(_):
                await until(lambda: busy(session.stats) == (0, 0, 0))
                tracker = session._connection.tracker
                await until(lambda: not tracker._calls)
                pending = tracker.table.pending.values()
                assert not any(entry.waits or entry.poll_at for entry in pending)

            assert await cancel_everywhere(act, check, late=late) > 3

    async def test_of_closing(self, late):
        """A close that is cancelled still closes: handles fail, and our asyncio tasks end."""
        async with Emulator(task_seconds=NEVER) as emulator:
            credentials = Credentials.from_url(emulator.cloudinary_url)
            tasks = []

            async def act():
                async with AnalyzeSession(
                    credentials, settings=quick(), notifications=asyncio.Queue()
                ) as session:
                    tasks[:] = [session.submit(request(index)) for index in range(3)]
                    await asyncio.gather(*(task.accepted() for task in tasks))
                    await session.aclose(drain=0.01)

            async def check(_):
                await until(lambda: not library_tasks())
                assert all(isinstance(task.exception(), SessionClosedError) for task in tasks)
                tasks.clear()

            assert await cancel_everywhere(act, check, late=late) > 3


class TestListening:
    @pytest.mark.parametrize("late", [False, True])
    async def test_cancelled_at_every_suspension_the_source_is_closed(self, clock, late):
        """The session's close cancels the listening wherever it is. The source is informed."""
        closed = []

        class Source(NotificationSource):
            async def listen(self):
                try:
                    for index in range(3):
                        await asyncio.sleep(0)
                        yield sign(build_result(f"t{index}"))
                finally:
                    closed.append(True)

            async def fetch(self, task_ids):
                await asyncio.sleep(0)
                return [sign(build_result(task_id)) for task_id in task_ids]

        for n in range(1, 12):
            closed.clear()
            suspensions = Suspensions(n, late=late)
            async with resolving(Service(clock), source=Source()) as tracker:
                await submit(tracker)
                listening = asyncio.create_task(suspensions.drive(tracker.listener._listen()))
                await asyncio.wait([listening], timeout=30)
                assert listening.done()
            assert closed
            assert not library_tasks()
            if suspensions.count < n:
                return
        raise AssertionError("it never completed")


class TestMany:
    async def test_a_cancelled_waiter_among_thousands_disturbs_no_other(self):
        async with connected(task_seconds=0.3) as (_, session):
            task = session.submit(request())
            waiters = [asyncio.ensure_future(task) for _ in range(2000)]
            await task.accepted()
            for waiter in waiters[::2]:
                waiter.cancel()
            outcomes = await asyncio.gather(*waiters, return_exceptions=True)
            assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes[::2])
            assert all(outcome.analysis.caption for outcome in outcomes[1::2])
