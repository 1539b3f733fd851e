"""The heap of what is due, and the many callbacks behind one timer of the clock."""

import asyncio
import random

import pytest

from cloudinary_analyze._clock import SYSTEM_CLOCK
from cloudinary_analyze._tasks.timers import BURST, DueHeap, Timers


def call(callback):
    callback()


class TestDueHeap:
    def test_gives_the_oldest_due_first(self):
        heap = DueHeap()
        chance = random.Random(1)
        dues = [chance.randrange(50) for _ in range(500)]
        for index, due in enumerate(dues):
            heap.push(due, (due, index))
        given = [heap.pop() for _ in dues if heap.next_due() is not None]
        assert [due for due, _ in given] == sorted(dues)
        assert len(set(given)) == len(dues)
        assert heap.next_due() is None

    def test_what_is_discarded_is_never_given_and_does_not_pile_up(self):
        heap = DueHeap()
        for index in range(100_000):
            heap.discard(heap.push(1e9 + index, "discarded"))
        heap.push(2e9, "kept")
        assert len(heap) == 1
        assert len(heap._heap) < 1000
        assert heap.next_due() == 2e9
        assert heap.pop() == "kept"

    def test_discarding_twice_or_after_the_pop_is_harmless(self):
        heap = DueHeap()
        node = heap.push(1, "a")
        other = heap.push(2, "b")
        heap.discard(node)
        heap.discard(node)
        assert heap.next_due() == 2
        assert heap.pop() == "b"
        heap.discard(other)
        assert len(heap) == 0

    def test_clear_discards_all_and_nodes_stay_harmless(self):
        heap = DueHeap()
        node = heap.push(1, "a")
        heap.clear()
        heap.discard(node)
        assert len(heap) == 0
        assert heap.next_due() is None


class TestTimers:
    async def test_callbacks_run_at_their_instants_in_order(self, clock):
        timers, ran = Timers(clock, call), []
        for when in (3, 1, 2, 1.5):
            timers.push(when, lambda when=when: ran.append((when, clock.now)))
        await clock.advance(2)
        assert ran == [(1, 1), (1.5, 1.5), (2, 2)]
        await clock.advance(1)
        assert ran[-1] == (3, 3)

    async def test_a_cancelled_callback_never_runs(self, clock):
        timers, ran = Timers(clock, call), []
        node = timers.push(1, lambda: ran.append("cancelled"))
        timers.push(2, lambda: ran.append("kept"))
        timers.discard(node)
        await clock.advance(5)
        assert ran == ["kept"]

    async def test_a_callback_may_set_timers_that_are_due_before_all_others(self, clock):
        timers, ran = Timers(clock, call), []

        def first():
            ran.append("first")
            timers.push(clock.now, lambda: ran.append("at once"))
            timers.push(2, lambda: ran.append("second"))

        timers.push(1, first)
        timers.push(3, lambda: ran.append("third"))
        await clock.advance(5)
        assert ran == ["first", "at once", "second", "third"]

    async def test_one_that_raises_does_not_stop_the_others(self, clock):
        timers, ran = Timers(clock, call), []

        def fail():
            raise ValueError("the callback broke")

        timers.push(1, fail)
        timers.push(1, lambda: ran.append("same instant"))
        timers.push(2, lambda: ran.append("later"))
        with pytest.raises(ValueError, match="broke"):
            await clock.advance(5)
        await clock.advance(5)
        assert ran == ["same instant", "later"]

    async def test_thousands_at_one_instant_leave_the_loop_room(self):
        """Deadlines of tasks that were submitted together must not stop the loop."""
        timers, ran = Timers(SYSTEM_CLOCK, call), []
        now = SYSTEM_CLOCK.monotonic()
        for index in range(5 * BURST):
            timers.push(now, lambda index=index: ran.append(index))
        progress = []
        while len(ran) < 5 * BURST:
            progress.append(len(ran))
            await asyncio.sleep(0)
        assert sorted(ran) == list(range(5 * BURST))
        assert len(set(progress)) >= 5

    async def test_close_forgets_everything(self, clock):
        timers, ran = Timers(clock, call), []
        node = timers.push(1, lambda: ran.append("late"))
        timers.clear()
        timers.discard(node)
        await clock.advance(5)
        assert not ran
        assert clock.next_at is None
