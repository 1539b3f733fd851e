"""The heap of deadlines, and the shelves whose values expire."""

import random
import time

import attrs
from scripted import no_collector

from cloudinary_analyze._tasks.timers import SLACK, DueHeap, Shelf


@attrs.define(eq=False)
class Item:
    due: float | None = None

    def __lt__(self, _):
        return False


def build_heap(dues=()):
    heap = DueHeap(lambda item: item.due)
    items = [Item(float(due)) for due in dues]
    for item in items:
        heap.push(item.due, item)
    return heap, items


def drain(heap):
    given = []
    while heap.next_due() is not None:
        given.append(heap.pop())
    return given


class TestDueHeap:
    def test_gives_the_earliest_first_also_with_equal_instants(self):
        chance = random.Random(1)
        heap, items = build_heap(chance.randrange(50) for _ in range(500))
        given = drain(heap)
        assert [item.due for item in given] == sorted(item.due for item in items)
        assert len(set(map(id, given))) == 500

    def test_rescheduled_and_cancelled_timers_are_skipped(self):
        heap, items = build_heap(range(6))
        items[0].due = None
        items[2].due = None
        items[1].due = 10.0
        heap.push(items[1].due, items[1])
        assert len(heap) == 4
        assert drain(heap) == [items[3], items[4], items[5], items[1]]

    def test_stale_pairs_do_not_accumulate(self):
        heap, (keeper,) = build_heap([2e9])
        for index in range(20_000):
            item = Item(1e9 + index)
            heap.push(item.due, item)
            item.due = None
        assert len(heap._heap) <= 2 * SLACK + 2
        assert drain(heap) == [keeper]

    def test_stale_pairs_are_skipped_in_one_pass(self):
        heap, items = build_heap(range(100_000))
        for item in items[:-1]:
            item.due = None
        with no_collector():
            begun = time.thread_time()
            assert heap.next_due() == 99_999
            assert time.thread_time() - begun < 0.05
        assert len(heap._heap) == 1


class TestShelf:
    def test_time_bounds_what_is_kept(self):
        shelf = Shelf(10.0)
        shelf.put("a", 1, 0)
        shelf.put("b", 2, 5)
        assert shelf.expire(9) is None
        assert shelf.next_due() == 10
        assert [shelf.expire(15), shelf.expire(15), shelf.expire(15)] == ["a", "b", None]
        assert shelf.next_due() is None

    def test_count_and_bytes_bound_what_is_kept(self):
        shelf = Shelf(10.0, 3, 100)
        assert shelf.put("a", 1, 0, size=40) == []
        assert shelf.put("b", 2, 0, size=40) == []
        assert shelf.put("c", 3, 0, size=70) == ["a", "b"]
        assert shelf.put("d", 4, 0, size=101) == ("d",)
        assert (shelf.get("c"), shelf.bytes, len(shelf)) == (3, 70, 1)
        for key in "efg":
            shelf.put(key, key, 0)
        assert [key for key in "cefg" if key in shelf] == ["e", "f", "g"]
        assert shelf.bytes == 0

    def test_putting_a_key_again_makes_it_the_youngest(self):
        shelf = Shelf(10.0, 2, 100)
        shelf.put("a", 1, 0, size=30)
        shelf.put("b", 2, 1, size=30)
        shelf.put("a", 3, 2, size=50)
        assert shelf.put("c", 4, 3, size=5) == ["b"]
        assert (shelf.get("a"), shelf.bytes) == (3, 55)
        assert (shelf.pop("a"), shelf.pop("a"), shelf.bytes) == (3, None, 5)

    def test_values_that_expire_together_take_linear_time(self):
        shelf = Shelf(10.0)
        for index in range(100_000):
            shelf.put(str(index), index, 0)
        begun = time.thread_time()
        while shelf.expire(10) is not None:
            pass
        assert time.thread_time() - begun < 1
        assert not shelf
