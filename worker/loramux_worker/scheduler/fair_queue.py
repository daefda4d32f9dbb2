"""Virtual Token Counter fair queuing.

Sheng et al., "Fairness in Serving Large Language Models", OSDI 2024, Algorithm 2, with weights. A client is an
adapter id (all revisions together) or the base model. Each has a counter of the service it received over its weight;
the client with the least counter goes next; a client that becomes active is lifted to the least counter of the active
ones, or of the one that was active last when there is none, so that nobody saves up while away.

Sequences of an adapter that is still being loaded are parked: their client is not active for them, hence it neither
holds down the least counter nor saves up while it waits.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heappop, heappush, heapreplace
from itertools import count

from loramux_worker.engine.sequence import Sequence
from loramux_worker.scheduler.client import Client, Lane
from loramux_worker.scheduler.policy import Policies
from loramux_worker.scheduler.tiers import AdapterKey


class FairQueue:
    """Waiting sequences by fair order of their adapters; within an adapter by priority, then arrival.

    A sequence is pushed, then admitted (it is in service now, and its client is charged), perhaps requeued, and in the
    end removed. Each costs O(log n) amortised in the number of clients and in the sequences of that client.

    Counters only ever grow, so a heap entry is never too late: one whose counter is out of date is put in its place
    when it comes to the top.
    """

    def __init__(self, policies: Policies | None = None) -> None:
        self._policies = policies or Policies()
        self._clients: dict[str | None, Client] = {}
        self._lanes: dict[AdapterKey | None, Lane] = {}
        self._held: set[str | None] = set()
        self._arrivals: dict[int, int] = {}
        self._numbers = count()
        self._active: list[tuple[float, int, Client]] = []
        self._aside: list[Client] = []
        self._idle: list[tuple[float, int, Client]] = []
        self._last_left: Client | None = None
        self._num_waiting = 0
        self._known_floor = 0.0  # not below the floor of some moment ago

    def __len__(self) -> int:
        """Sequences that wait, the parked ones too."""
        return self._num_waiting

    @property
    def num_clients(self) -> int:
        """Clients whose counters are kept."""
        return len(self._clients)

    @property
    def floor(self) -> float:
        """The counter that a client who becomes active now has at least. It never falls."""
        assert not self._aside, "the floor is not known while clients are set aside"
        least = self._least()
        if least is not None:
            return least.counter
        return 0.0 if self._last_left is None else self._last_left.counter

    def client(self, adapter_id: str | None) -> Client | None:
        """The client, if one is kept."""
        return self._clients.get(adapter_id)

    def counter(self, adapter_id: str | None) -> float:
        """The client's virtual token counter. One that is not kept would begin at the floor."""
        client = self._clients.get(adapter_id)
        return self.floor if client is None else client.counter

    def order(self, sequence: Sequence) -> tuple[int, int, int]:
        """The sequence's place among those of its adapter: priority, preempted ones first, arrival."""
        return (
            -sequence.priority,
            0 if sequence.num_preemptions else 1,
            self._arrivals[sequence.sequence_id],
        )

    def push(self, sequence: Sequence) -> None:
        """Let a sequence wait, parked if its lane is."""
        lane = self._lane(sequence.adapter_key)
        self._arrivals.setdefault(sequence.sequence_id, next(self._numbers))
        lane.waiting.push(sequence, self.order(sequence))
        self._num_waiting += 1
        self._refresh(lane.client)

    def requeue(self, sequence: Sequence) -> None:
        """Let a preempted sequence wait again, before those of its adapter and priority that never ran."""
        self._lane(sequence.adapter_key).client.in_service -= 1
        self.push(sequence)

    def admit(self, lane: Lane) -> None:
        """Take the head of a lane into service."""
        lane.client.in_service += 1
        lane.client.overtaken = 0.0
        self._leave(lane, lane.head)

    def remove(self, sequence: Sequence) -> None:
        """Forget a sequence, whether it waits or is in service."""
        lane = self._lanes.get(sequence.adapter_key)
        del self._arrivals[sequence.sequence_id]
        if lane is not None and sequence in lane.waiting:
            self._leave(lane, sequence)
            return
        client = self._clients[_adapter_id(sequence.adapter_key)]
        client.in_service -= 1
        self._refresh(client)

    def charge(self, adapter_id: str | None, service: float) -> None:
        """Count service, in weighted tokens, that a client with sequences here was given."""
        self._clients[adapter_id].charge(service)

    def park(self, key: AdapterKey) -> None:
        """Nothing of this adapter may run until `unpark`."""
        lane = self._lane(key)
        lane.parked = True
        self._refresh(lane.client)

    def unpark(self, key: AdapterKey) -> list[Sequence]:
        """The adapter's sequences may run; returns those that wait."""
        lane = self._lanes.get(key)
        if lane is None:
            return []
        lane.parked = False
        self._refresh(lane.client)
        return list(lane.waiting)

    def hold(self, client: Client) -> None:
        """Nothing of this client may be admitted until `release`."""
        self._held.add(client.adapter_id)
        client.is_held = True
        self._refresh(client)

    def release(self, adapter_id: str | None) -> None:
        """The adapter's sequences may be admitted, if they were held."""
        self._held.discard(adapter_id)
        client = self._clients.get(adapter_id)
        if client is not None and client.is_held:
            client.is_held = False
            self._refresh(client)

    def waits(self, key: AdapterKey) -> bool:
        """Whether a sequence waits with this adapter, parked or not."""
        return key in self._lanes

    def turn(self, adapter_id: str | None) -> float:
        """The counter from which the adapter's next sequence is served, here or to come."""
        client = self._clients.get(adapter_id)
        return self._known_floor if client is None else max(client.counter, self._known_floor)

    def is_parked(self, key: AdapterKey) -> bool:
        """Whether sequences wait for this adapter to be loaded."""
        lane = self._lanes.get(key)
        return lane is not None and lane.parked

    def waiting(self, key: AdapterKey | None) -> list[Sequence]:
        """The sequences that wait with this adapter, parked or not."""
        lane = self._lanes.get(key)
        return [] if lane is None else list(lane.waiting)

    def peek(self) -> Lane | None:
        """The lane whose head is next: that of the least-served active client that is not set aside."""
        client = self._least()
        return None if client is None else client.ready_lane

    def ready_lanes(self, keys: Iterable[AdapterKey | None]) -> list[Lane]:
        """Of the lanes of these adapters, those whose head is the next of its client."""
        lanes = map(self._lanes.get, keys)
        return [lane for lane in lanes if lane is not None and lane.client.ready_lane is lane]

    def set_aside(self) -> None:
        """Hide the client of the lane that `peek` shows, until `restore`. There must be one."""
        client = self._least()
        assert client is not None, "nobody is there to be set aside"
        heappop(self._active)
        client.in_heap = False
        self._aside.append(client)

    def restore(self) -> None:
        """Show the clients again that were set aside."""
        for client in self._aside:
            self._enter(client)
        self._aside.clear()

    def check_integrity(self) -> None:
        """Raise AssertionError unless the queue is in order. Costs a walk over everything; for tests and idle times."""
        assert not self._aside, "clients were left aside"
        assert sum(len(lane.waiting) for lane in self._lanes.values()) == self._num_waiting
        in_service = sum(client.in_service for client in self._clients.values())
        assert len(self._arrivals) == self._num_waiting + in_service, "an arrival number outlived its sequence"
        for lane in self._lanes.values():
            assert len(lane.waiting), "an empty lane was kept"
            assert self._clients[lane.client.adapter_id].lanes[lane.key] is lane
        for client in self._clients.values():
            assert client.ready_lane is client.find_ready_lane()
            assert client.in_heap or client.ready_lane is None, "an active client is not in the heap"
            assert client.in_idle_heap or not client.is_idle, "an idle client is never forgotten"
            assert client.in_service >= 0
            assert client.counter >= self.floor or client.ready_lane is None, "an active client is below the floor"

    def _lane(self, key: AdapterKey | None) -> Lane:
        lane = self._lanes.get(key)
        if lane is None:
            adapter_id = _adapter_id(key)
            client = self._clients.get(adapter_id)
            if client is None:
                client = Client(adapter_id, self._policies.of(adapter_id), next(self._numbers))
                client.is_held = adapter_id in self._held
                self._clients[adapter_id] = client
            lane = self._lanes[key] = client.lanes[key] = Lane(client, key)
        return lane

    def _leave(self, lane: Lane, sequence: Sequence) -> None:
        lane.waiting.remove(sequence)
        self._num_waiting -= 1
        if not lane.waiting:
            del self._lanes[lane.key], lane.client.lanes[lane.key]
        self._refresh(lane.client)

    def _refresh(self, client: Client) -> None:
        """Follow a change of the client's lanes: it may have become active, inactive or idle."""
        ready_lane = client.find_ready_lane()
        if ready_lane is None and client.ready_lane is not None:
            self._last_left = client
        elif ready_lane is not None and client.ready_lane is None:
            self._known_floor = self.floor
            client.lift(self._known_floor)
            client.order = next(self._numbers)
            client.overtaken = 0.0
        client.ready_lane = ready_lane
        self._enter(client)
        if client.is_idle:
            self._forget_the_idle(client)

    def _enter(self, client: Client) -> None:
        if client.ready_lane is not None and not client.in_heap:
            client.in_heap = True
            heappush(self._active, (client.counter, client.order, client))

    def _least(self) -> Client | None:
        """The least-served active client; entries on the way to it are corrected or dropped."""
        heap = self._active
        while heap:
            counter, order, client = heap[0]
            if client.ready_lane is None:
                heappop(heap)
                client.in_heap = False
            elif counter != client.counter or order != client.order:
                heapreplace(heap, (client.counter, client.order, client))
            else:
                return client
        return None

    def _forget_the_idle(self, client: Client) -> None:
        """Drop idle clients that have no more than the floor: coming back, they would be lifted to it anyway.

        The others must be kept, or leaving and coming back would be a way to be served more. So what is kept is
        bounded by the adapters that were served more than the least-served active one.
        """
        if not client.in_idle_heap:
            client.in_idle_heap = True
            heappush(self._idle, (client.counter, client.order, client))
        floor = self._known_floor = self.floor
        while self._idle and self._idle[0][0] <= floor:
            _, _, idle = heappop(self._idle)
            idle.in_idle_heap = False
            if idle.is_idle and idle.counter <= floor:
                del self._clients[idle.adapter_id]
            elif idle.is_idle:
                idle.in_idle_heap = True
                heappush(self._idle, (idle.counter, idle.order, idle))


def _adapter_id(key: AdapterKey | None) -> str | None:
    return None if key is None else key[0]
