"""Permits are handed out in turn, cut once per generation, grow back, and never leak."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cloudinary_analyze import SessionClosedError
from cloudinary_analyze._http.permits import Permits
from cloudinary_analyze.testing import ManualClock


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_permits_bound_what_is_out_and_go_first_come_first_served(clock: ManualClock) -> None:
    gate = Permits(2, clock)
    order: list[int] = []

    async def use(number: int) -> None:
        await gate.acquire()
        order.append(number)

    tasks = [asyncio.create_task(use(number)) for number in range(5)]
    await settle()
    assert (order, gate.in_use, gate.waiting) == ([0, 1], 2, 3)
    for expected in (2, 3, 4):
        gate.release()
        await settle()
        assert order[-1] == expected
        assert gate.in_use == 2
    await asyncio.gather(*tasks)
    gate.release()
    gate.release()
    assert (gate.in_use, gate.waiting, gate.idle) == (0, 0, True)


async def test_sixty_four_throttles_of_one_generation_are_one_cut(clock: ManualClock) -> None:
    gate = Permits(64, clock)
    generation = gate.generation
    assert [gate.throttle(generation, 5) for _ in range(64)] == [True] + [False] * 63
    assert gate.allowed == 32
    assert gate.throttle(gate.generation, 5)
    assert gate.allowed == 16


async def test_permits_never_fall_below_one(clock: ManualClock) -> None:
    gate = Permits(3, clock)
    for _ in range(5):
        gate.throttle(gate.generation, 1)
    assert gate.allowed == 1


async def test_permits_grow_back_by_one_for_each_window_of_successes(clock: ManualClock) -> None:
    gate = Permits(8, clock)
    gate.throttle(gate.generation, 0.1)
    assert gate.allowed == 4
    seen = []
    for _ in range(4 + 5 + 6 + 7):
        gate.succeed()
        seen.append(gate.allowed)
    assert seen == [4] * 3 + [5] * 5 + [6] * 6 + [7] * 7 + [8]
    gate.succeed()
    assert gate.allowed == 8


async def test_nobody_passes_during_a_pause_and_all_that_may_pass_after_it(
    clock: ManualClock,
) -> None:
    gate = Permits(4, clock)
    gate.throttle(gate.generation, 10)
    passed = []

    async def use() -> None:
        await gate.acquire()
        passed.append(clock.now)

    tasks = [asyncio.create_task(use()) for _ in range(4)]
    await clock.advance(9.999)
    assert (passed, gate.idle, gate.waiting) == ([], False, 4)
    await clock.advance(0.001)
    assert (passed, gate.in_use) == ([10, 10], 2)
    gate.release()
    gate.release()
    await asyncio.gather(*tasks)


async def test_a_pause_is_lengthened_but_never_shortened(clock: ManualClock) -> None:
    gate = Permits(4, clock)
    generation = gate.generation
    gate.throttle(generation, 10)
    gate.throttle(generation, 3)
    assert gate.resume_at == 10
    gate.throttle(generation, 20)
    assert gate.resume_at == 20
    await clock.advance(15)
    assert not gate.idle
    await clock.advance(5)
    assert gate.idle
    assert clock.next_at is None


async def test_the_pause_is_looked_at_again_after_the_permit_was_handed_out(
    clock: ManualClock,
) -> None:
    gate = Permits(1, clock)
    await gate.acquire()
    first = asyncio.create_task(gate.acquire())
    second = asyncio.create_task(gate.acquire())
    await settle()
    gate.release()  # the first has its permit, but has not run yet
    gate.throttle(gate.generation, 5)
    await settle()
    assert not first.done()
    assert (gate.in_use, gate.waiting) == (0, 2)
    await clock.advance(5)
    assert first.done()
    assert not second.done()
    gate.release()
    await second
    gate.release()


@pytest.mark.parametrize("handed_out", [False, True])
async def test_cancelling_in_the_queue_leaves_no_trace(
    clock: ManualClock, handed_out: bool
) -> None:
    gate = Permits(1, clock)
    await gate.acquire()
    victim = asyncio.create_task(gate.acquire())
    heir = asyncio.create_task(gate.acquire())
    await settle()
    if handed_out:
        gate.release()
    victim.cancel()
    await settle()
    assert victim.cancelled()
    if not handed_out:
        gate.release()
        await settle()
    assert heir.done()
    assert (gate.in_use, gate.waiting) == (1, 0)


async def test_closing_fails_all_that_queue_and_all_that_come_later(clock: ManualClock) -> None:
    gate = Permits(1, clock)
    await gate.acquire()
    gate.throttle(gate.generation, 60)
    queueing = [asyncio.create_task(gate.acquire()) for _ in range(3)]
    await settle()
    gate.close(SessionClosedError("closed"))
    for task in queueing:
        with pytest.raises(SessionClosedError):
            await task
    with pytest.raises(SessionClosedError):
        await gate.acquire()
    assert clock.next_at is None
    gate.release()
    assert (gate.in_use, gate.waiting) == (0, 0)


@given(seed=st.integers(0, 10_000), permits=st.integers(1, 5))
def test_no_mix_of_cancels_pauses_and_successes_leaks_or_overdraws_a_permit(
    seed: int, permits: int
) -> None:
    chance = random.Random(seed)

    async def run() -> None:
        clock = ManualClock()
        gate = Permits(permits, clock)

        async def use() -> None:
            if gate.idle:
                gate.in_use += 1
            else:
                await gate.acquire()
            assert gate.resume_at is None
            assert gate.in_use <= permits
            generation = gate.generation
            try:
                for _ in range(chance.randrange(4)):
                    await asyncio.sleep(0)
                if chance.random() < 0.2:
                    gate.throttle(generation, chance.random() * 3)
                elif chance.random() < 0.7:
                    gate.succeed()
            finally:
                gate.release()

        tasks: list[asyncio.Task[Any]] = []
        for _ in range(25):
            tasks.append(asyncio.create_task(use()))
            if chance.random() < 0.3:
                chance.choice(tasks).cancel()
            if chance.random() < 0.5:
                await asyncio.sleep(0)
            if chance.random() < 0.2:
                await clock.advance(chance.random())
        while not all(task.done() for task in tasks):
            await clock.advance(1)
        for task in tasks:
            assert task.cancelled() or task.exception() is None
        assert (gate.in_use, gate.waiting) == (0, 0)
        assert gate.resume_at is None or clock.next_at is not None

    asyncio.run(run())
