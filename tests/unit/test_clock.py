"""The manual clock behaves like the system clock, without real waiting."""

from __future__ import annotations

import asyncio
import time

import pytest

from cloudinary_analyze._clock import SYSTEM_CLOCK
from cloudinary_analyze.testing import ManualClock


async def test_timers_fire_in_the_order_of_their_time(clock: ManualClock) -> None:
    fired: list[tuple[str, float]] = []
    for name, when in (("c", 3.0), ("a", 1.0), ("b", 2.0), ("b2", 2.0)):
        clock.call_at(when, lambda name=name: fired.append((name, clock.now)))
    clock.call_at(1.5, lambda: fired.append(("never", 0))).cancel()
    await clock.advance(2.5)
    assert fired == [("a", 1.0), ("b", 2.0), ("b2", 2.0)]
    assert (clock.now, clock.next_at) == (2.5, 3.0)


async def test_sleepers_wake_on_time_and_cancel_cleanly(
    clock: ManualClock,
) -> None:
    woken: list[float] = []

    async def sleep(seconds: float) -> None:
        await clock.sleep(seconds)
        woken.append(clock.now)

    tasks = [asyncio.create_task(sleep(seconds)) for seconds in (1, 2, 3)]
    await asyncio.sleep(0)
    tasks[1].cancel()
    await clock.advance(10)
    assert woken == [1, 3]
    assert clock.next_at is None


async def test_sleepers_that_sleep_again_wake_within_one_advance(clock: ManualClock) -> None:
    async def tick() -> int:
        for _ in range(5):
            await clock.sleep(1)
        return int(clock.now)

    task = asyncio.create_task(tick())
    await clock.advance(5)
    assert await task == 5


async def test_a_timeout_ends_its_block_at_the_instant(clock: ManualClock) -> None:
    async def wait() -> None:
        async with clock.timeout_at(5):
            await clock.sleep(60)

    task = asyncio.create_task(wait())
    await clock.advance(4.9)
    assert not task.done()
    await clock.advance(0.1)
    await asyncio.sleep(0.001)
    with pytest.raises(TimeoutError):
        await task


async def test_wall_and_monotonic_move_together(clock: ManualClock) -> None:
    before = clock.wall()
    await clock.advance(7)
    assert (clock.monotonic(), clock.wall() - before) == (7, 7)


async def test_the_system_clock_follows_real_time() -> None:
    begun = SYSTEM_CLOCK.monotonic()
    assert abs(SYSTEM_CLOCK.wall() - time.time()) < 30
    with pytest.raises(TimeoutError):
        async with SYSTEM_CLOCK.timeout_at(begun + 0.01):
            await SYSTEM_CLOCK.sleep(60)
    with pytest.raises(TimeoutError):
        async with SYSTEM_CLOCK.timeout_at(begun - 5):
            await SYSTEM_CLOCK.sleep(60)
    fired = asyncio.Event()
    SYSTEM_CLOCK.call_at(begun - 1, fired.set)
    await asyncio.wait_for(fired.wait(), 30)
    assert SYSTEM_CLOCK.monotonic() - begun < 30


class TestRun:
    async def test_the_clock_moves_from_timer_to_timer(self, clock: ManualClock) -> None:
        async def act() -> str:
            await clock.sleep(3600)
            await asyncio.sleep(0.01)  # the event loop wakes this in real time only
            await clock.sleep(60)
            return "done"

        assert await clock.run(act()) == "done"
        assert clock.now == 3660

    async def test_errors_and_results_of_futures_are_passed_on(self, clock: ManualClock) -> None:
        async def fail() -> None:
            await clock.sleep(5)
            raise TimeoutError("its own")

        with pytest.raises(TimeoutError, match="its own"):
            await clock.run(fail())
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        clock.call_at(9, lambda: future.set_result(7))
        assert await clock.run(future) == 7

    async def test_a_task_that_hangs_is_cancelled(self, clock: ManualClock) -> None:
        task = asyncio.create_task(asyncio.Event().wait())
        with pytest.raises(TimeoutError, match="real seconds"):
            await clock.run(task, seconds=0.01)
        await asyncio.sleep(0)
        assert task.cancelled()

    async def test_cancelling_run_cancels_its_task(self, clock: ManualClock) -> None:
        task = asyncio.create_task(asyncio.Event().wait())
        running = asyncio.create_task(clock.run(task))
        await asyncio.sleep(0.005)
        running.cancel()
        await asyncio.wait([running])
        await asyncio.sleep(0)
        assert running.cancelled()
        assert task.cancelled()
