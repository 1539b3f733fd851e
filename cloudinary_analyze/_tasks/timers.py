"""Things that are due at an instant, made for hundreds of thousands of them."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from operator import attrgetter
from typing import Any, Final, Generic, TypeVar

import attrs

from cloudinary_analyze._clock import Clock, TimerHandle

T = TypeVar("T")

LEAST_COMPACTED: Final = 256
BURST: Final = 100  # items taken between two turns of the loop


@attrs.define(eq=False, repr=False, weakref_slot=False)
class Node:
    """An item's place in a heap; half the size of a list with a tie-breaker.

    Attributes:
        due: Monotonic instant.
        item: ``None`` once it was taken or discarded.
    """

    due: float
    item: Any

    def __lt__(self, other: Node) -> bool:
        return self.due < other.due


_get_due: Final = attrgetter("due")


@attrs.define(eq=False, repr=False)
class DueHeap(Generic[T]):
    """Items by the monotonic instant when they are due. Discarding one is cheap."""

    _heap: list[Node] = attrs.field(factory=list, init=False)
    _discarded: int = attrs.field(default=0, init=False)

    def __len__(self) -> int:
        return len(self._heap) - self._discarded

    def push(self, due: float, item: T) -> Node:
        """Add an item and return the node to discard it by."""
        node = Node(due, item)
        heapq.heappush(self._heap, node)
        return node

    def discard(self, node: Node) -> None:
        """Remove an item; harmless if it is gone."""
        if node.item is None:
            return
        node.item = None
        self._discarded += 1
        # what is discarded must not pile up until it would have been due
        if self._discarded > LEAST_COMPACTED and self._discarded * 2 > len(self._heap):
            self._heap = [kept for kept in self._heap if kept.item is not None]
            self._heap.sort(key=_get_due)  # is a heap too, and made without a call of __lt__
            self._discarded = 0

    def clear(self) -> None:
        """Discard all items."""
        for node in self._heap:
            node.item = None
        self._heap.clear()
        self._discarded = 0

    def next_due(self) -> float | None:
        """Return when the first item is due; ``None`` if there is none."""
        heap = self._heap
        while heap and heap[0].item is None:
            heapq.heappop(heap)
            self._discarded -= 1
        return heap[0].due if heap else None

    def pop(self) -> T:
        """Remove and return the first item; call `next_due` before."""
        node = heapq.heappop(self._heap)
        item: T = node.item
        node.item = None
        return item


@attrs.define(eq=False, repr=False)
class Timers(DueHeap[T]):
    """Items that one function takes when they are due, behind one timer of the clock.

    An item each, not a callback each: closures would double what a pending task costs.

    Attributes:
        on_due: Takes an item at its instant.
    """

    clock: Clock
    on_due: Callable[[T], None]
    _timer: TimerHandle | None = attrs.field(default=None, init=False)
    _timer_at: float | None = attrs.field(default=None, init=False)

    def push(self, due: float, item: T) -> Node:
        """Have an item taken at a monotonic instant; return the node to discard it by."""
        node = super().push(due, item)
        if self._timer_at is None or due < self._timer_at:
            self._arm(due)
        return node

    def clear(self) -> None:
        """Discard all items."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._timer_at = None
        super().clear()

    def _arm(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = when
        self._timer = self.clock.call_at(when, self._fire)

    def _fire(self) -> None:
        self._timer = self._timer_at = None
        now = self.clock.monotonic()
        try:
            for _ in range(BURST):
                due = self.next_due()
                if due is None or due > now:
                    break
                self.on_due(self.pop())
        finally:
            due = self.next_due()
            if due is not None and (self._timer_at is None or due < self._timer_at):
                self._arm(due)
