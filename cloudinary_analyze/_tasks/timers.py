"""A timer heap for hundreds of thousands of deadlines, and a store with expiry. Pure."""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, Generic, TypeVar

import attrs

T = TypeVar("T")

SLICE: Final = 0.002  # seconds of work between two turns of the event loop
SLACK: Final = 256  # stale pairs that a heap may hold besides one per item


@attrs.define(eq=False, repr=False)
class DueHeap(Generic[T]):
    """Items by the monotonic instant when they are due, as plain pairs.

    An item knows its own instant. A pair is stale once the item has another instant or none, so
    nothing has to be removed from the heap. Items are compared (``<``) if their instants are equal.

    Attributes:
        read_due: Returns the instant of an item: the float that it was pushed with, or ``None``.
    """

    read_due: Callable[[T], float | None]
    _heap: list[tuple[float, T]] = attrs.field(factory=list, init=False)
    _most: int = attrs.field(default=SLACK, init=False)

    def __len__(self) -> int:
        return sum(self.read_due(item) is due for due, item in self._heap)

    def push(self, due: float, item: T) -> None:
        """Add an item. Its instant must be this float object."""
        if len(self._heap) >= self._most:
            self._compact()
        heapq.heappush(self._heap, (due, item))

    def _compact(self) -> None:
        self._heap = [pair for pair in self._heap if self.read_due(pair[1]) is pair[0]]
        heapq.heapify(self._heap)
        self._most = 2 * len(self._heap) + SLACK

    def next_due(self) -> float | None:
        """Return the instant of the first item. ``None`` if there is none."""
        heap = self._heap
        for _ in range(SLACK):
            if not heap:
                return None
            due, item = heap[0]
            if self.read_due(item) is due:
                return due
            heapq.heappop(heap)
        self._compact()  # one pass is faster than popping thousands of stale pairs
        return self._heap[0][0] if self._heap else None

    def pop(self) -> T:
        """Remove and return the first item. Call `next_due` before."""
        return heapq.heappop(self._heap)[1]

    def clear(self) -> None:
        """Remove all items."""
        self._heap.clear()


@attrs.define(eq=False, repr=False)
class Shelf(Generic[T]):
    """Values that are kept for a time, bounded by age, count and bytes.

    The oldest are dropped first.

    Attributes:
        seconds: How long a value is kept.
        most: How many values are kept; default: any number.
        most_bytes: How many bytes they may have together; default: any number.
    """

    seconds: float
    most: float = math.inf
    most_bytes: float = math.inf
    bytes: int = attrs.field(default=0, init=False)
    _items: OrderedDict[str, tuple[float, int, T]] = attrs.field(factory=OrderedDict, init=False)

    def __len__(self) -> int:
        return len(self._items)

    def __contains__(self, key: str) -> bool:
        return key in self._items

    def get(self, key: str) -> T | None:
        """Return a value, if it is kept."""
        item = self._items.get(key)
        return None if item is None else item[2]

    def pop(self, key: str) -> T | None:
        """Remove and return a value, if it is kept."""
        item = self._items.pop(key, None)
        if item is None:
            return None
        self.bytes -= item[1]
        return item[2]

    def put(self, key: str, value: T, now: float, *, size: int = 0) -> Sequence[str]:
        """Keep a value as the newest. It replaces an earlier value of its key.

        Args:
            key: Its name.
            value: The value.
            now: Monotonic instant.
            size: Its bytes.

        Returns:
            The dropped keys: the oldest, or this one if it alone exceeds the bounds.
        """
        if key in self._items:
            self.pop(key)
        if size > self.most_bytes:
            return (key,)
        self._items[key] = (now + self.seconds, size, value)
        self.bytes += size
        gone: list[str] = []
        while len(self._items) > self.most or self.bytes > self.most_bytes:
            gone.append(self._drop_oldest())
        return gone

    def _drop_oldest(self) -> str:
        key, (_, size, _) = self._items.popitem(last=False)
        self.bytes -= size
        return key

    def next_due(self) -> float | None:
        """Return when the oldest value expires. ``None`` if there is none."""
        return next(iter(self._items.values()))[0] if self._items else None

    def expire(self, now: float) -> str | None:
        """Remove the oldest value if it has expired, and return its key."""
        due = self.next_due()
        return self._drop_oldest() if due is not None and due <= now else None

    def clear(self) -> None:
        """Remove all values."""
        self._items.clear()
        self.bytes = 0
