"""The look-ahead: which of the requests that were read are worked on, and which are parked until their adapter may.

    window.park(request)                            # read from Kafka
    while (request := window.start()) is not None:  # has a seat now: to be worked on
        …
    window.finish(request)                          # answered: its seat is free

Kafka gives a partition's records in order, so the backlog of one adapter hides whoever stands behind it. Hence more
is read than is worked on. What is worked on has a *seat*: it is tokenised, its adapter is fetched, an engine has it.
What is beyond its adapter's share of the seats is *parked*: its bytes wait here, and nothing else is done for it.

Why parked in memory, and neither paused nor produced again to another topic:

- A paused partition hides everybody in it. Pausing is what happens in the end, when the room for parking runs out;
  until then it would be the very fault that the look-ahead is there to mend.
- A second topic moves a request away from its place: its answer is no longer committed where it was asked, order
  within the adapter and exactly-once need a transaction more for each request, and the lag that autoscaling reads
  counts it twice or not at all.
- A parked request is still in Kafka, unanswered: a crash, a drain or a lost partition forgets these bytes, and
  whoever owns the partition reads them again. It costs memory alone, and that is bounded, by number and by bytes.

How far it sees is bounded by the room for parking, and by the offsets that one partition may have above its
watermark (`kafka.tracker`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Final

from loramux_worker.glance import Glanced
from loramux_worker.scheduler.removable_heap import RemovableHeap

MOST_AT_ONCE: Final = 256  # records that are read in one go: some milliseconds of work for the event loop


@dataclass(slots=True, eq=False)
class _Adapter:
    adapter_id: str | None
    turn: int = 0  # when it came, or was last given a seat
    in_hand: int = 0
    parked: RemovableHeap[Glanced] = field(default_factory=RemovableHeap)


@dataclass(slots=True)
class _Load:
    """What is parked of one partition, or of all."""

    requests: int = 0
    size: int = 0

    def add(self, requests: int, size: int) -> None:
        self.requests += requests
        self.size += size


class Window:
    """`seats` requests in hand, and at most `max_parked` of them, about `max_parked_bytes` in all, parked.

    Dynamic thresholds (Choudhury and Hahne, "Dynamic queue length thresholds for shared-memory packet switches",
    1998) share both out: an adapter may have share/(1-share) times as many seats as are free. Alone it gets `share`
    of them, n that flood get as many each as one another, and some stay free for whoever comes next. Partitions
    share the parking room likewise: one that has its part is `full_partitions`, not to be read, and the others go on.

    A seat goes to the adapter that has the fewest, of equals to the one that waits longest. So nobody waits for ever
    as long as what is in hand gets answered; and while anything is parked, `share` of the seats are taken. Within an
    adapter priority decides, then order of reading.

    Bytes may go over their bound by what is read in one go.
    """

    def __init__(self, seats: int, share: float, max_parked: int, max_parked_bytes: int) -> None:
        assert 0 < share < 1, "the share of one adapter is a part of the seats"
        self._seats = seats
        self._times_free = share / (1 - share)
        self._max_parked = max_parked
        self._max_parked_bytes = max_parked_bytes
        self._adapters: dict[str | None, _Adapter] = {}  # with a request in hand or parked
        self._waiting: RemovableHeap[_Adapter] = RemovableHeap()  # with a request parked
        self._in_hand = 0
        self._parked = _Load()
        self._by_partition: defaultdict[int, _Load] = defaultdict(_Load)
        self._turns = count()

    @property
    def in_hand(self) -> int:
        """Requests that have a seat."""
        return self._in_hand

    @property
    def parked(self) -> int:
        """Requests that wait for one."""
        return self._parked.requests

    @property
    def parked_bytes(self) -> int:
        """What they take in memory."""
        return self._parked.size

    @property
    def room(self) -> int:
        """Records that may be read now."""
        if self._parked.size >= self._max_parked_bytes:
            return 0
        return min(MOST_AT_ONCE, self._max_parked - self._parked.requests)

    @property
    def full_partitions(self) -> frozenset[int]:
        """The partitions that have their share of the parking room."""
        allowed = self._times_free * (1 - self._filled(self._parked))
        return frozenset(number for number, load in self._by_partition.items() if self._filled(load) >= allowed)

    def park(self, request: Glanced) -> None:
        """Take note of a request that was read. The caller asks `start` next."""
        adapter = self._adapters.get(request.adapter_id)
        if adapter is None:
            adapter = self._adapters[request.adapter_id] = _Adapter(request.adapter_id, next(self._turns))
        adapter.parked.push(request, (-request.priority,))
        self._count(request, 1)
        if len(adapter.parked) == 1:
            self._waiting.push(adapter, (adapter.in_hand, adapter.turn))

    def start(self) -> Glanced | None:
        """Give a seat to the next request whose adapter may have one; None when there is none."""
        if not self._waiting or self._in_hand >= self._seats:
            return None
        _, adapter = self._waiting.first()
        # it has the fewest: where it may not, nobody may
        if adapter.in_hand >= self._times_free * (self._seats - self._in_hand):
            return None
        request = adapter.parked.pop()
        self._count(request, -1)
        self._in_hand += 1
        adapter.in_hand += 1
        adapter.turn = next(self._turns)
        self._place(adapter)
        return request

    def finish(self, request: Glanced) -> None:
        """A request that `start` gave is no longer worked on."""
        adapter = self._adapters[request.adapter_id]
        self._in_hand -= 1
        adapter.in_hand -= 1
        self._place(adapter)

    def withdraw(self, request: Glanced) -> bool:
        """Take a request out of the parked ones; False if it is not among them."""
        adapter = self._adapters.get(request.adapter_id)
        if adapter is None or request not in adapter.parked:
            return False
        adapter.parked.remove(request)
        self._count(request, -1)
        self._place(adapter)
        return True

    def lose(self, lost: Collection[tuple[int, int]]) -> list[Glanced]:
        """Withdraw everything parked of these (partition, epoch), and return it."""
        return self._withdraw_all(each for each in self if (each.record.partition, each.record.epoch) in lost)

    def clear(self) -> list[Glanced]:
        """Withdraw everything that is parked, and return it."""
        return self._withdraw_all(self)

    def __iter__(self) -> Iterator[Glanced]:
        """Everything that is parked, in no order."""
        for adapter in self._waiting:
            yield from adapter.parked

    def check_integrity(self) -> None:
        """Asserts what must hold between any two calls."""
        parked = list(self)
        assert 0 <= self._in_hand <= self._seats, "no more is in hand than there are seats"
        assert self._in_hand == sum(adapter.in_hand for adapter in self._adapters.values())
        assert self._parked == _Load(len(parked), sum(each.size for each in parked))
        assert self._parked.requests == sum(load.requests for load in self._by_partition.values())
        assert self._parked.size == sum(load.size for load in self._by_partition.values())
        assert all(load.requests for load in self._by_partition.values()), "those without parked ones are forgotten"
        for adapter in self._adapters.values():
            assert adapter.in_hand or adapter.parked, "adapters without requests are forgotten"
            assert bool(adapter.parked) == (adapter in self._waiting)

    def _withdraw_all(self, requests: Iterable[Glanced]) -> list[Glanced]:
        withdrawn = list(requests)
        for request in withdrawn:
            self.withdraw(request)
        return withdrawn

    def _place(self, adapter: _Adapter) -> None:
        """Follow a change of what the adapter has in hand or parked."""
        if adapter in self._waiting:
            self._waiting.remove(adapter)
        if adapter.parked:
            self._waiting.push(adapter, (adapter.in_hand, adapter.turn))
        elif not adapter.in_hand:
            del self._adapters[adapter.adapter_id]

    def _count(self, request: Glanced, sign: int) -> None:
        number = request.record.partition
        for load in (self._parked, self._by_partition[number]):
            load.add(sign, sign * request.size)
        if not self._by_partition[number].requests:
            del self._by_partition[number]

    def _filled(self, load: _Load) -> float:
        return max(load.requests / self._max_parked, load.size / self._max_parked_bytes)
