"""A heap of things that are due at an instant, made for hundreds of thousands of them."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from typing import Any, Final, Generic, TypeVar

import attrs

from cloudinary_analyze._clock import Clock, TimerHandle

T = TypeVar("T")

LEAST_COMPACTED: Final = 256

Node = list[Any]
"""``[due, order, item]``; the item is ``None`` once it was discarded."""


@attrs.define(eq=False)
class DueHeap(Generic[T]):
    """Items by the monotonic instant when they are due. Discarding one is cheap."""

    _heap: list[Node] = attrs.field(factory=list)
    _order: itertools.count[int] = attrs.field(factory=itertools.count)
    _discarded: int = 0

    def __len__(self) -> int:
        return len(self._heap) - self._discarded

    def push(self, due: float, item: T) -> Node:
        """Add an item and return the node to discard it by."""
        node: Node = [due, next(self._order), item]
        heapq.heappush(self._heap, node)
        return node

    def discard(self, node: Node) -> None:
        """Remove an item; harmless if it is gone."""
        if node[2] is None:
            return
        node[2] = None
        self._discarded += 1
        # what is discarded must not pile up until it would have been due
        if self._discarded > LEAST_COMPACTED and self._discarded * 2 > len(self._heap):
            self._heap = [kept for kept in self._heap if kept[2] is not None]
            heapq.heapify(self._heap)
            self._discarded = 0

    def next_due(self) -> float | None:
        """Return when the first item is due; ``None`` if there is none."""
        heap = self._heap
        while heap and heap[0][2] is None:
            heapq.heappop(heap)
            self._discarded -= 1
        due: float | None = heap[0][0] if heap else None
        return due

    def pop(self) -> T:
        """Remove and return the first item; call `next_due` before."""
        node = heapq.heappop(self._heap)
        item: T = node[2]
        node[2] = None
        return item


@attrs.define(eq=False)
class Timers:
    """Callbacks at monotonic instants, behind one timer of the clock."""

    clock: Clock
    _due: DueHeap[Callable[[], None]] = attrs.field(factory=DueHeap)
    _timer: TimerHandle | None = None
    _timer_at: float | None = None

    def call_at(self, when: float, callback: Callable[[], None]) -> Node:
        """Run a callback at an instant; return the node to `cancel` it by."""
        node = self._due.push(when, callback)
        if self._timer_at is None or when < self._timer_at:
            self._arm(when)
        return node

    def cancel(self, node: Node) -> None:
        """Forget a callback; harmless if it has run."""
        self._due.discard(node)

    def close(self) -> None:
        """Forget all callbacks."""
        if self._timer is not None:
            self._timer.cancel()
        self._due = DueHeap()
        self._timer = self._timer_at = None

    def _arm(self, when: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = when
        self._timer = self.clock.call_at(when, self._fire)

    def _fire(self) -> None:
        self._timer = self._timer_at = None
        now = self.clock.monotonic()
        while (due := self._due.next_due()) is not None:
            if due > now:
                self._arm(due)
                return
            self._due.pop()()
