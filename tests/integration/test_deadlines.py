"""Timeouts and closes of a session are never mistaken for cancellations by a caller."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from scripted import CAPTION, URL, ScriptedServer, after, answer, busy, never_answer, until

from cloudinary_analyze import (
    AnalyzeSession,
    AttemptTimeoutError,
    CallTimeoutError,
    Captioning,
    PacerError,
    Response,
    SessionClosedError,
)
from cloudinary_analyze.events import CallFinished

LOOPS = ["asyncio", "uvloop", *(["eager"] if sys.version_info >= (3, 12) else [])]
READ_TIMEOUT = 0.2
# the read timeout may also fire before the caller's end, on a busy machine even much earlier; no
# retry comes between
SLOW_RETRIES = {"read_timeout": READ_TIMEOUT, "attempts": 6, "backoff_first": 60, "backoff_max": 60}


def run(kind: str, main: Callable[[], Awaitable[None]]) -> None:
    """Run a test on a kind of loop; a hang is a failure."""

    async def bounded() -> None:
        if kind == "eager":
            asyncio.get_running_loop().set_task_factory(asyncio.eager_task_factory)
        async with asyncio.timeout(30):
            await main()

    factory = asyncio.new_event_loop
    if kind == "uvloop":
        factory = pytest.importorskip("uvloop").new_event_loop
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(bounded())


async def end_by_timeout_argument(session: AnalyzeSession, seconds: float) -> bool:
    """Return whether the error says that the request may have been charged."""
    with pytest.raises(CallTimeoutError) as caught:
        await session.analyze(Captioning(URL), timeout=seconds)
    return caught.value.ambiguous


async def end_by_scope(session: AnalyzeSession, seconds: float) -> None:
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(seconds):
            await session.analyze(Captioning(URL))
    assert type(caught.value) is TimeoutError


async def end_by_wait_for(session: AnalyzeSession, seconds: float) -> None:
    with pytest.raises(TimeoutError) as caught:
        await asyncio.wait_for(session.analyze(Captioning(URL)), seconds)
    assert type(caught.value) is TimeoutError


async def end_by_cancel(session: AnalyzeSession, seconds: float) -> None:
    call = asyncio.create_task(session.analyze(Captioning(URL)))
    asyncio.get_running_loop().call_later(seconds, call.cancel)
    with pytest.raises(asyncio.CancelledError):
        await call
    assert call.cancelled()


async def end_by_group(session: AnalyzeSession, seconds: float) -> None:
    async def fail() -> None:
        await asyncio.sleep(seconds)
        raise ZeroDivisionError

    with pytest.RaisesGroup(ZeroDivisionError):
        async with asyncio.TaskGroup() as group:
            call = group.create_task(session.analyze(Captioning(URL)))
            group.create_task(fail())
    assert call.cancelled()


ENDS = [end_by_timeout_argument, end_by_scope, end_by_wait_for, end_by_cancel, end_by_group]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("loop", LOOPS)
def test_a_callers_deadline_wins_over_the_read_timeout(loop: str, end: Any) -> None:
    async def main() -> None:
        async with ScriptedServer(never_answer) as server:
            async with server.session(**SLOW_RETRIES) as session:
                ambiguous = await end(session, READ_TIMEOUT)
                # none, if the machine is too busy to connect by then
                assert len(server.seen) <= 1
                assert ambiguous is not False or not server.seen
                assert busy(session.stats) == (0, 0, 0)

    run(loop, main)


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("share", [0.5, 1.5])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_callers_deadline_wins_after_a_blocked_loop(loop: str, end: Any, share: float) -> None:
    async def main() -> None:
        async with ScriptedServer(never_answer) as server:
            async with server.session(**SLOW_RETRIES) as session:
                calls = 0
                while not server.seen:  # again, if the machine is too busy to connect by the end
                    calls += 1
                    ending = asyncio.create_task(end(session, READ_TIMEOUT * share))
                    await until(lambda ending=ending: server.seen or ending.done())
                time.sleep(2 * READ_TIMEOUT)
                assert await ending is not False
                assert len(server.seen) <= session.stats.attempts <= calls
                assert busy(session.stats) == (0, 0, 0)

    run(loop, main)


async def test_a_permit_that_comes_after_the_deadline_is_not_used() -> None:
    """The loop is blocked between the response that frees the permit and the timer."""
    queued = asyncio.Event()

    def block(event: object) -> None:
        if isinstance(event, CallFinished):
            time.sleep(0.4)

    async with ScriptedServer(after(queued)) as server:
        async with server.session(permits=1, on_event=block) as session:
            first = asyncio.create_task(session.analyze(Captioning(URL)))
            await until(lambda: server.seen)
            second = asyncio.create_task(session.analyze(Captioning(URL), timeout=0.3))
            await until(lambda: session.stats.waiting or second.done())
            queued.set()
            await first
            with pytest.raises(CallTimeoutError) as caught:
                await second
            assert len(server.seen) == 1
            assert not caught.value.ambiguous


async def test_a_task_that_survived_a_cancellation_still_has_read_timeouts() -> None:
    """Clean-up code may call us in a task whose count of cancellations stays above zero."""
    async with ScriptedServer(never_answer) as server:
        async with server.session(read_timeout=0.5, attempts=2) as session:

            async def clean_up() -> None:
                try:
                    await asyncio.sleep(60)
                finally:
                    with pytest.raises(AttemptTimeoutError):
                        await session.analyze(Captioning(URL))

            task = asyncio.create_task(clean_up())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert len(server.seen) == 2


async def test_our_own_interruption_leaves_no_count_behind() -> None:
    async with ScriptedServer(never_answer) as server:
        async with server.session(read_timeout=0.02, attempts=3) as session:
            task = asyncio.current_task()
            assert task is not None
            with pytest.raises(AttemptTimeoutError):
                await session.analyze(Captioning(URL))
            assert task.cancelling() == 0


class CancelledPacer:
    async def acquire(self) -> None:
        future = asyncio.get_running_loop().create_future()
        future.cancel()
        await future


async def test_a_pacer_that_raises_cancelled_error_fails_its_call() -> None:
    async with ScriptedServer(CAPTION) as server:
        async with server.session(pacer=CancelledPacer()) as session:
            with pytest.raises(PacerError, match="CancelledError") as caught:
                await session.analyze(Captioning(URL))
            assert isinstance(caught.value.__cause__, asyncio.CancelledError)
            assert (len(server.seen), busy(session.stats)) == (0, (0, 0, 0))


class EndlessPacer:
    async def acquire(self) -> None:
        await asyncio.get_running_loop().create_future()


async def test_closing_ends_the_wait_for_a_pacer() -> None:
    async with asyncio.timeout(30), ScriptedServer(CAPTION) as server:
        session = await server.session(pacer=EndlessPacer()).__aenter__()
        calls = [asyncio.create_task(session.analyze(Captioning(URL))) for _ in range(3)]
        await asyncio.sleep(0.01)
        await session.aclose()
        for call in calls:
            with pytest.raises(SessionClosedError):
                await call
            assert call.cancelling() == 0


async def test_a_cancellation_wins_over_a_close_in_the_same_turn() -> None:
    async with asyncio.timeout(30), ScriptedServer(CAPTION) as server:
        session = await server.session(pacer=EndlessPacer()).__aenter__()
        call = asyncio.create_task(session.analyze(Captioning(URL)))
        await asyncio.sleep(0.01)
        closing = asyncio.create_task(session.aclose())
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await closing


async def test_a_hook_that_raises_cancelled_error_disturbs_nothing() -> None:
    def hook(_: object) -> None:
        raise asyncio.CancelledError

    async with ScriptedServer(answer(503)) as server:
        server.handler = CAPTION
        async with server.session(on_event=hook) as session:
            response = await session.analyze(Captioning(URL))
            assert response.model == "captioning"


@pytest.mark.parametrize("loop", LOOPS)
def test_calls_and_handles_work_on_every_kind_of_loop(loop: str) -> None:
    async def main() -> None:
        async with ScriptedServer(CAPTION) as server:
            async with server.session(permits=4) as session:
                calls = [asyncio.create_task(session.analyze(Captioning(URL))) for _ in range(50)]
                handles = [session.submit(Captioning(URL)) for _ in range(50)]
                left = session.submit(Captioning(URL))
                for response in await asyncio.gather(*calls, *handles):
                    assert response.model == "captioning"
                await left
                assert busy(session.stats) == (0, 0, 0)
                dropped = session.submit(Captioning(URL))
        (ending,) = await asyncio.gather(dropped, return_exceptions=True)
        assert isinstance(ending, Response | SessionClosedError)  # an eager task has begun

    run(loop, main)
