"""Which parts of a flat run of elements are taken: no torch, no data."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple


class Extent(NamedTuple):
    """`size` elements from `offset` on."""

    offset: int
    size: int

    @property
    def end(self) -> int:
        """The first element after it."""
        return self.offset + self.size


class Move(NamedTuple):
    """An extent that is to start at `to`, which is lower."""

    extent: Extent
    to: int


class ExtentAllocator:
    """Best-fit allocation of extents; holes next to each other are one."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.num_free = capacity
        self._taken: list[Extent] = []  # by offset

    @property
    def taken(self) -> tuple[Extent, ...]:
        """The extents that are taken, by offset."""
        return tuple(self._taken)

    def allocate(self, size: int) -> int | None:
        """The offset of the smallest hole that holds `size` elements, which are then taken; None without one."""
        holes = [hole for hole in self._holes() if hole.size >= size]
        if not holes:
            return None
        offset = min(holes, key=lambda hole: (hole.size, hole.offset)).offset
        insort(self._taken, Extent(offset, size))
        self.num_free -= size
        return offset

    def free(self, offset: int) -> None:
        """Give back the extent that starts at `offset`."""
        extent = self._taken.pop(self._index(offset))
        self.num_free += extent.size

    def plan_moves(self, size: int) -> list[Move]:
        """The moves, lowest first, that open a hole of `size` elements and carry the fewest elements.

        Neighbouring extents slide down over the holes between them, which adds up those holes and the one behind.
        The run of neighbours with the smallest sum of sizes is found with two pointers. At least `size` elements
        must be free.
        """
        assert size <= self.num_free
        holes = [hole.size for hole in self._holes(also_empty=True)]  # holes[i] lies before taken[i]
        best: tuple[int, int, int] | None = None  # elements carried, first and last neighbour (exclusive)
        first = carried = 0
        opened = holes[0]
        for last in range(len(self._taken) + 1):
            if last > 0:
                carried += self._taken[last - 1].size
                opened += holes[last]
            while first < last and opened - holes[first] >= size:
                opened -= holes[first]
                carried -= self._taken[first].size
                first += 1
            if opened >= size and (best is None or carried < best[0]):
                best = (carried, first, last)
        assert best is not None
        _, first, last = best
        to = self._taken[first - 1].end if first > 0 else 0
        moves = []
        for extent in self._taken[first:last]:
            if extent.offset != to:
                moves.append(Move(extent, to))
            to += extent.size
        return moves

    def apply(self, move: Move) -> None:
        """Note that an extent lies somewhere else now; the moves of a plan must be applied in their order."""
        self._taken[self._index(move.extent.offset)] = Extent(move.to, move.extent.size)

    def check_integrity(self) -> None:
        """Assert that extents are in order, disjoint and inside, and the count of free elements true."""
        at = 0
        for extent in self._taken:
            assert extent.size > 0
            assert extent.offset >= at, f"{extent} overlaps the one before"
            at = extent.end
        assert at <= self.capacity
        assert self.num_free == self.capacity - sum(extent.size for extent in self._taken)

    def _holes(self, also_empty: bool = False) -> list[Extent]:
        """The holes by offset; with the empty ones there is one before each extent and one at the end."""
        starts = [0, *(extent.end for extent in self._taken)]
        ends = [*(extent.offset for extent in self._taken), self.capacity]
        holes = [Extent(start, end - start) for start, end in zip(starts, ends, strict=True)]
        return holes if also_empty else [hole for hole in holes if hole.size > 0]

    def _index(self, offset: int) -> int:
        index = bisect_left(self._taken, (offset, 0))
        assert index < len(self._taken)
        assert self._taken[index].offset == offset, f"no extent starts at {offset}"
        return index
