"""Which requests of a partition have been read, which are answered, and how far may be committed.

Requests complete out of order. Offsets have gaps (compaction, transaction markers), so only offsets that were
really polled count. The span from the watermark to the newest polled offset is bounded: reading of the
partition stops at the bound, and what is answered inside it always fits into the commit's metadata.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Set
from enum import Enum, auto
from itertools import chain

from loramux_worker.kafka.metadata import MAX_WINDOW


class Admission(Enum):
    """What `OffsetsTracker.admit` says about a polled offset."""

    NEW = auto()  # in flight from now on
    ANSWERED = auto()  # answered before a restart: not to be answered again
    SEEN = auto()  # polled twice, as after a seek
    NO_ROOM = auto()  # the window is full: to be polled again later


class OffsetsTracker:
    """Seen, in-flight and done offsets of one (partition, epoch).

    Offsets are admitted in ascending order from `position`, at most `max_window` (1 … MAX_WINDOW) offsets
    from the watermark; `answered` are offsets at or above `position` that need no answer any more.
    """

    def __init__(self, position: int, *, max_window: int, answered: Iterable[int] = ()) -> None:
        if not 0 < max_window <= MAX_WINDOW:
            raise ValueError(f"a window of {max_window} offsets: 1 to {MAX_WINDOW} are possible")
        self._max_window = max_window
        # Above the bound, but still worth a poll: with less room than this a poll would fetch crumbs.
        self._least_room = max(1, max_window // 16)
        self._next = position
        self._seen: deque[int] = deque()  # polled offsets from the watermark on; the first is in flight
        self._in_flight: set[int] = set()
        self._done: set[int] = set()  # of `_seen`, answered
        self._known: deque[int] = deque(sorted(answered))  # answered, not polled again yet
        self._refused: int | None = None  # the offset that found no room

    @property
    def next_position(self) -> int:
        """Where reading goes on: one above the newest polled offset."""
        return self._next

    @property
    def watermark(self) -> int:
        """The offset below which every polled request is answered."""
        return self._seen[0] if self._seen else self._next

    @property
    def in_flight(self) -> int:
        """Number of requests that wait for their answer."""
        return len(self._in_flight)

    @property
    def uncommitted(self) -> int:
        """Number of answered requests above the watermark."""
        return len(self._done)

    @property
    def room(self) -> int:
        """How many offsets in a row certainly fit."""
        return max(0, self.watermark + self._max_window - self._next)

    @property
    def is_full(self) -> bool:
        """Whether reading of this partition has to wait for answers."""
        return self.room < self._least_room or (self._refused is not None and not self._fits(self._refused))

    def admit(self, offset: int) -> Admission:
        """Takes note of a polled offset and says what is to be done with its request."""
        if offset < self._next:
            return Admission.SEEN
        if not self._fits(offset):
            self._refused = offset
            return Admission.NO_ROOM
        self._refused = None
        answered = self._forget_known(offset)
        self._next = offset + 1
        if not answered:
            self._seen.append(offset)
            self._in_flight.add(offset)
            return Admission.NEW
        if self._seen:
            self._seen.append(offset)
            self._done.add(offset)
        return Admission.ANSWERED

    def done(self, offset: int) -> bool:
        """The request at `offset` is answered; False if it was not in flight."""
        if offset not in self._in_flight:
            return False
        self._in_flight.remove(offset)
        self._done.add(offset)
        while self._seen and self._seen[0] in self._done:
            self._done.remove(self._seen.popleft())
        return True

    def skip_to(self, position: int) -> None:
        """Offsets below `position` cannot be read any more; what is in flight stays so."""
        self._next = max(self._next, position)
        self._forget_known(self._next - 1)

    def commit(self, answered: Set[int] = frozenset(), idle_position: int | None = None) -> tuple[int, list[int]]:
        """The position to commit and the answered offsets at and above it, in no order.

        Requests in flight at the offsets `answered` count as answered: what a transaction is to say before it is
        known to have succeeded. With nothing left in flight the position is the consumer's own, if that is told:
        it lies behind transaction markers, which are offsets that nobody can poll, and a group that commits its
        newest record + 1 never reaches lag 0.
        """
        position = next((offset for offset in self._seen if self._waits(offset, answered)), None)
        if position is None:
            position = max(self._next, idle_position if idle_position is not None else 0)
        done = chain(self._done, answered & self._in_flight, self._known)
        return position, [offset for offset in done if offset >= position]

    def check_integrity(self) -> None:
        """Asserts what must hold between any two calls."""
        assert list(self._seen) == sorted(set(self._seen)), "polled offsets ascend"
        assert self._in_flight.isdisjoint(self._done), "nothing is both in flight and done"
        assert set(self._seen) == self._in_flight | self._done, "what was polled is in flight or done"
        assert not self._seen or self._seen[0] in self._in_flight, "the watermark waits for its answer"
        assert not self._seen or self._seen[-1] < self._next, "reading goes on above what was polled"
        assert all(offset >= self._next for offset in self._known), "what was polled is no longer only known"
        assert not self._seen or self._seen[-1] - self._seen[0] < self._max_window, "the window is bounded"

    def _waits(self, offset: int, answered: Set[int]) -> bool:
        return offset in self._in_flight and offset not in answered

    def _fits(self, offset: int) -> bool:
        return not self._seen or offset - self._seen[0] < self._max_window

    def _forget_known(self, offset: int) -> bool:
        # What lies below was compacted away; whether `offset` itself was known as answered.
        while self._known and self._known[0] < offset:
            self._known.popleft()
        if self._known and self._known[0] == offset:
            self._known.popleft()
            return True
        return False
