"""A priority queue from whose middle items can be taken out."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Generic, TypeVar

Item = TypeVar("Item")

OrderKey = tuple[float, ...]


class RemovableHeap(Generic[Item]):
    """The item of the least key first; equal keys in the order they came.

    Taking an item out of the middle leaves its entry behind as a dead one, which is dropped when it comes to the
    top or when the dead outnumber the living, so that every operation costs O(log n) amortised. An item is in the
    heap at most once; items are told apart by hash and equality.
    """

    __slots__ = ("_heap", "_live", "_ties")

    def __init__(self) -> None:
        self._heap: list[tuple[OrderKey, int, Item]] = []
        self._live: dict[Item, int] = {}
        self._ties = count()

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, item: Item) -> bool:
        return item in self._live

    def __iter__(self) -> Iterator[Item]:
        """Every item, in the order they came."""
        return iter(self._live)

    def push(self, item: Item, key: OrderKey) -> None:
        """Add an item that is not in the heap."""
        assert item not in self._live, "the item is in the heap already"
        tie = next(self._ties)
        self._live[item] = tie
        heappush(self._heap, (key, tie, item))

    def first(self) -> tuple[OrderKey, Item]:
        """Key and item that `pop` would take. Raises IndexError when empty."""
        key, _, item = self._heap[0]
        return key, item

    def pop(self) -> Item:
        """Take the item of the least key. Raises IndexError when empty."""
        item = heappop(self._heap)[2]
        del self._live[item]
        self._drop_dead()
        return item

    def remove(self, item: Item) -> None:
        """Take an item from wherever it is. Raises KeyError when it is not here."""
        del self._live[item]
        self._drop_dead()

    def _drop_dead(self) -> None:
        """Keep a living entry at the top, and fewer dead ones than living ones."""
        if len(self._heap) > 2 * len(self._live) + 8:
            self._heap = [entry for entry in self._heap if self._live.get(entry[2]) == entry[1]]
            heapify(self._heap)
        while self._heap and self._live.get(self._heap[0][2]) != self._heap[0][1]:
            heappop(self._heap)
