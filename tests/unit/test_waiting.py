"""Waiting attempts start in order, none is lost or started twice, and every wait ends."""

from __future__ import annotations

import asyncio
import heapq
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloudinary_analyze import OutageError, SessionClosedError
from cloudinary_analyze._http.admission import Admission, Attempt
from cloudinary_analyze._http.limits import State
from cloudinary_analyze._http.waiting import FAILURES_IN_A_TURN, AdmissionQueue
from cloudinary_analyze.testing import ManualClock


class Refused(Exception):
    """Represents the error of the session."""


def build_queue(permits: int, clock: ManualClock) -> AdmissionQueue:
    admission = Admission(permits, random.Random(1).random)
    return AdmissionQueue(admission, clock)


async def settle(turns: int = 5) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)


def start(queue: AdmissionQueue, **options: Any) -> asyncio.Task[Attempt]:
    return asyncio.create_task(queue.start(**options))


async def stall(queue: AdmissionQueue) -> None:
    """Start every attempt, and let the service throttle all of them."""
    attempts = [await queue.start() for _ in range(queue.admission.permits)]
    for attempt in attempts:
        queue.throttle(attempt)
    for attempt in attempts:
        queue.release(attempt)
    assert queue.admission.state is State.STALLED


async def test_attempts_start_in_order_under_the_permits(clock: ManualClock) -> None:
    queue = build_queue(2, clock)
    tasks = [start(queue) for _ in range(5)]
    await settle()
    assert [task.done() for task in tasks] == [True, True, False, False, False]
    assert (queue.admission.in_use, queue.waiting, queue.start_at_once()) == (2, 3, None)
    for index in range(3):
        attempt = tasks[index].result()
        queue.succeed(attempt)
        queue.release(attempt)
        await settle()
        assert [task.done() for task in tasks].count(True) == index + 3
        assert queue.admission.in_use == 2
    assert queue.waiting == 0


async def test_an_attempt_starts_at_once_without_a_limit(clock: ManualClock) -> None:
    queue = build_queue(2, clock)
    first, second = queue.start_at_once(), queue.start_at_once()
    assert first is not None
    assert second is not None
    assert queue.start_at_once() is None
    queue.succeed(first)
    queue.release(first)
    assert queue.start_at_once() is not None
    assert queue.admission.in_use == 2


async def test_restarted_attempts_come_first(clock: ManualClock) -> None:
    queue = build_queue(1, clock)
    held = await queue.start()
    order: list[str] = []

    async def use(name: str, **options: bool) -> None:
        attempt = await queue.start(**options)
        order.append(name)
        queue.release(attempt)

    tasks = [asyncio.create_task(use(name)) for name in ("a", "b")]
    await settle()
    tasks += [asyncio.create_task(use("again", first=True))]
    await settle()
    queue.release(held)
    await asyncio.gather(*tasks)
    assert order == ["again", "a", "b"]


async def test_urgent_attempts_get_three_of_four_starts(clock: ManualClock) -> None:
    queue = build_queue(1, clock)
    held = await queue.start()
    order: list[str] = []

    async def use(name: str, *, urgent: bool) -> None:
        attempt = await queue.start(urgent=urgent)
        order.append(name)
        queue.release(attempt)

    tasks = [asyncio.create_task(use("o", urgent=False)) for _ in range(8)]
    tasks += [asyncio.create_task(use("u", urgent=True)) for _ in range(8)]
    await settle()
    queue.release(held)
    await asyncio.gather(*tasks)
    assert "".join(order) == "uuuouuuouuoooooo"


async def test_a_stall_requeues_attempts_that_did_not_run(
    clock: ManualClock,
) -> None:
    queue = build_queue(16, clock)
    held = [await queue.start() for _ in range(16)]
    waiting = [start(queue) for _ in range(4)]
    await settle()
    for attempt in held[:4]:
        queue.succeed(attempt)
        queue.release(attempt)  # starts the four that wait; their tasks have not run yet
    queue.admission.stall(clock.now, 5.0)
    await settle()
    assert not any(task.done() for task in waiting)
    assert (queue.admission.in_use, queue.waiting) == (12, 4)
    for attempt in held[4:]:
        queue.release(attempt)
    await clock.advance(10)
    assert [task.done() for task in waiting] == [True, False, False, False]
    probe = waiting[0].result()
    assert probe.probe
    queue.succeed(probe)
    queue.release(probe)
    await clock.advance(2)
    assert all(task.done() for task in waiting)


async def test_one_probe_at_a_time_starts_during_a_stall(clock: ManualClock) -> None:
    queue = build_queue(16, clock)
    await stall(queue)
    tasks = {start(queue) for _ in range(50)}
    for _ in range(10):
        await clock.advance(8)
        (done,) = [task for task in tasks if task.done()]
        tasks.remove(done)
        queue.fail(done.result())
        queue.release(done.result())
    for task in tasks:
        task.cancel()
    await settle()
    assert (queue.waiting, queue.admission.in_use) == (0, 0)


async def test_waiting_attempts_fail_after_the_patience(clock: ManualClock) -> None:
    queue = build_queue(16, clock)
    await stall(queue)
    probe = start(queue)
    await clock.advance(2)
    assert probe.result().probe  # it stays in flight
    urgent, other = start(queue, urgent=True, patience=15), start(queue, patience=120)
    again = start(queue, urgent=True, first=True, patience=15)
    await clock.advance(14)
    assert not urgent.done()
    await clock.advance(2)
    assert isinstance(urgent.exception(), OutageError)
    assert isinstance(again.exception(), OutageError)
    assert not other.done()
    await clock.advance(105)
    assert isinstance(other.exception(), OutageError)
    assert (queue.waiting, queue.admission.in_use) == (0, 1)


async def test_a_stall_shorter_than_the_patience_fails_nothing(clock: ManualClock) -> None:
    queue = build_queue(16, clock)
    await clock.advance(1000)
    await stall(queue)
    tasks = [start(queue, urgent=True, patience=15) for _ in range(3)]
    await clock.advance(2)
    (probe,) = [task.result() for task in tasks if task.done()]
    queue.succeed(probe)
    queue.release(probe)
    await clock.advance(2)
    assert all(task.done() and task.exception() is None for task in tasks)


async def test_a_long_wait_fails_every_start_until_it_ends(clock: ManualClock) -> None:
    queue = build_queue(1, clock)
    held = await queue.start()
    waiting = start(queue)
    await settle()
    queue.throttle(held, 3600)
    queue.refuse(clock.now + 3600, Refused)
    queue.release(held)
    await settle()
    assert isinstance(waiting.exception(), Refused)
    await clock.advance(600)
    with pytest.raises(Refused) as raised:
        await queue.start()
    assert raised.value.args == (3000.0,)
    assert queue.start_at_once() is None
    await clock.advance(3001)
    queue.release(await queue.start())
    assert queue.admission.in_use == 0


async def test_an_attempt_granted_during_closing_is_not_sent(clock: ManualClock) -> None:
    queue = build_queue(1, clock)
    held = await queue.start()
    granted, waiting = start(queue), start(queue)
    await settle()
    queue.release(held)
    queue.close(SessionClosedError("closed"))
    await settle()
    for task in (granted, waiting, start(queue)):
        with pytest.raises(SessionClosedError):
            await task
    await queue.wait_empty()
    assert (queue.admission.in_use, queue.waiting) == (0, 0)


@pytest.mark.parametrize("how", ["close", "refuse"])
async def test_many_waiters_fail_over_several_loop_turns(clock: ManualClock, how: str) -> None:
    queue = build_queue(1, clock)
    held = await queue.start()
    count = 3 * FAILURES_IN_A_TURN + 5
    waiting = [start(queue, urgent=index % 2 == 0) for index in range(count)]
    await settle()
    if how == "close":
        queue.close(SessionClosedError("closed"))
    else:
        queue.refuse(clock.now + 60, Refused)
    assert queue.waiting == count - FAILURES_IN_A_TURN
    waiting[-1].cancel()
    queue.release(held)  # starts nothing
    left = count
    while left:
        await asyncio.sleep(0)
        before, left = left, sum(not task.done() for task in waiting)
        assert before - left <= FAILURES_IN_A_TURN + 1
    assert (queue.admission.in_use, queue.waiting) == (0, 0)
    await asyncio.wait(waiting)
    assert waiting[-1].cancelled()
    kind = SessionClosedError if how == "close" else Refused
    assert all(isinstance(task.exception(), kind) for task in waiting[:-1])


async def test_a_start_after_a_short_refusal_is_kept(clock: ManualClock) -> None:
    queue = build_queue(1, clock)
    held = await queue.start()
    refused = [start(queue) for _ in range(FAILURES_IN_A_TURN + 5)]
    await settle()
    queue.refuse(clock.now + 1, Refused)
    clock.now += 2  # within the same turn
    late = start(queue)
    await settle()
    queue.release(held)
    for task in refused:
        if await asyncio.wait({task}) and not task.exception():
            queue.release(task.result())  # it still waited when starts were allowed again
    queue.release(await late)
    assert (queue.admission.in_use, queue.waiting) == (0, 0)


async def test_closing_waits_until_every_waiter_failed(clock: ManualClock) -> None:
    queue = build_queue(1, clock)
    queue.release(await queue.start())
    held = await queue.start()
    waiting = [start(queue) for _ in range(3 * FAILURES_IN_A_TURN)]
    await settle()
    queue.close(SessionClosedError("closed"))
    queue.release(held)
    await queue.wait_empty()
    await settle()
    assert all(task.done() for task in waiting)
    for task in waiting:
        task.exception()


async def test_closing_waits_for_attempts_in_flight(clock: ManualClock) -> None:
    queue = build_queue(2, clock)
    first, second = await queue.start(), await queue.start()
    queue.close(SessionClosedError("closed"))
    emptied = asyncio.create_task(queue.wait_empty())
    queue.release(first)
    await settle()
    assert not emptied.done()
    queue.release(second)
    await settle()
    assert emptied.done()


async def test_a_cancelled_wait_passes_its_start_on(clock: ManualClock) -> None:
    queue = build_queue(1, clock)
    held = await queue.start()
    first, second = start(queue), start(queue)
    await settle()
    queue.release(held)  # starts `first`, which is cancelled before it runs
    first.cancel()
    await settle()
    assert first.cancelled()
    assert second.done()
    assert (queue.admission.in_use, queue.waiting) == (1, 0)


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["start", "start", "cancel", "ok", "throttle", "fail", "drop", "wait"]),
        st.integers(0, 99),
        st.booleans(),
        st.booleans(),
    ),
    max_size=80,
)


@settings(max_examples=80)
@given(STEPS, st.integers(1, 4), st.booleans())
def test_no_waiter_is_lost(
    steps: list[tuple[str, int, bool, bool]], permits: int, close: bool
) -> None:
    async def run() -> None:
        clock = ManualClock()
        queue = build_queue(permits, clock)
        tasks: list[asyncio.Task[Attempt]] = []
        flying: list[Attempt] = []

        def collect() -> None:
            for task in [task for task in tasks if task.done()]:
                tasks.remove(task)
                if not task.cancelled():
                    flying.append(task.result())

        for step, index, flag, turn in steps:
            if step == "start":
                tasks.append(start(queue, urgent=flag, first=turn))
            elif step == "wait":
                await clock.advance(index / 20)
            elif step == "cancel" and tasks:
                tasks[index % len(tasks)].cancel()
            elif flying and step != "cancel":
                attempt = flying.pop(index % len(flying))
                if step != "drop":
                    report = {"ok": queue.succeed, "throttle": queue.throttle, "fail": queue.fail}
                    report[step](attempt)
                queue.release(attempt)
            if turn:
                await settle()
            collect()
            assert len(flying) <= permits
        if close:
            queue.close(SessionClosedError("closed"))
            await settle()
            while tasks:
                task = tasks.pop()
                assert task.done()
                if not task.cancelled() and task.exception() is None:
                    flying.append(task.result())
            for attempt in flying:
                queue.release(attempt)
            flying.clear()
        for _ in range(2000):
            if not tasks and not flying:
                break
            for attempt in flying:
                queue.succeed(attempt)
                queue.release(attempt)
            flying.clear()
            await clock.advance(1)
            collect()
        assert (tasks, flying, queue.waiting, queue.admission.in_use) == ([], [], 0, 0)

    asyncio.run(run())


# ---------------------------------------------------------------- the queue under load


async def run_virtually(clock: ManualClock, seconds: float) -> None:
    """Move the clock from timer to timer, with fewer turns of the loop than `advance`."""
    until = clock.now + seconds
    await settle(4)
    while (due := clock.next_at) is not None and due <= until:
        clock.now = max(clock.now, due)
        while clock.next_at is not None and clock.next_at <= clock.now:
            clock._fire(heapq.heappop(clock._timers)[2])
        await settle(4)


def call_forever(
    queue: AdmissionQueue,
    serve: Callable[[Attempt], Awaitable[None]],
    count: int,
    *,
    urgent: bool = False,
) -> list[asyncio.Task[None]]:
    async def work() -> None:
        while True:
            attempt = queue.start_at_once() or await queue.start(urgent=urgent)
            try:
                await serve(attempt)
            finally:
                queue.release(attempt)

    return [asyncio.create_task(work()) for _ in range(count)]


async def test_the_queue_uses_the_rate_that_the_service_allows(clock: ManualClock) -> None:
    queue = build_queue(64, clock)
    tokens, last, good, bad = 10.0, 0.0, 0, 0

    async def serve(attempt: Attempt) -> None:
        nonlocal tokens, last, good, bad
        tokens, last = min(10.0, tokens + 50 * (clock.now - last)), clock.now
        if tokens < 1:
            await clock.sleep(0.005)
            queue.throttle(attempt)
            bad += clock.now > 10
            return
        tokens -= 1
        await clock.sleep(0.1)
        queue.succeed(attempt)
        good += clock.now > 10

    tasks = call_forever(queue, serve, 100)
    await run_virtually(clock, 30)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert good / (50 * 20) >= 0.95
    assert bad / good <= 0.03
    assert (queue.admission.in_use, queue.waiting) == (0, 0)


async def test_bulk_work_less_than_doubles_interactive_latency(
    clock: ManualClock,
) -> None:
    queue = build_queue(64, clock)
    chance = random.Random(1)
    took: list[float] = []

    async def serve(attempt: Attempt) -> None:
        await clock.sleep(0.2 * chance.lognormvariate(0, 0.3))
        queue.succeed(attempt)

    async def interact(at: float) -> None:
        await clock.sleep(at)
        begun = clock.now
        attempt = queue.start_at_once() or await queue.start(urgent=True)
        await serve(attempt)
        queue.release(attempt)
        took.append(clock.now - begun)

    bulk = call_forever(queue, serve, 500)
    calls = [asyncio.create_task(interact(1 + number / 20)) for number in range(200)]
    await run_virtually(clock, 15)
    assert all(call.done() for call in calls)
    alone = sorted(0.2 * random.Random(2).lognormvariate(0, 0.3) for _ in range(200))[190]
    assert sorted(took)[190] <= 2 * alone
    for task in bulk:
        task.cancel()
    await asyncio.gather(*bulk, return_exceptions=True)


@pytest.mark.slow
async def test_the_cost_per_waiter_is_constant_to_100_000(clock: ManualClock) -> None:
    queue = build_queue(1, clock)
    held = await queue.start()
    tasks = [start(queue, urgent=index % 2 == 0) for index in range(100_000)]
    await settle(2)
    assert queue.waiting == 100_000
    begun = time.process_time()
    random.Random(1).shuffle(tasks)
    for task in tasks[:50_000]:
        task.cancel()
    await settle(2)
    assert queue.waiting == 50_000
    queue.release(held)
    await settle(2)
    assert queue.waiting == 49_999
    queue.close(SessionClosedError("closed"))
    await asyncio.gather(*tasks, return_exceptions=True)
    assert time.process_time() - begun < 20  # a search of the queue per waiter takes minutes
    assert queue.waiting == 0
