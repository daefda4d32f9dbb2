"""Whatever happens to the fair queue, it gives the order that the paper's algorithm gives."""

from __future__ import annotations

from collections import Counter, defaultdict

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loramux_worker.engine.sequence import Sequence
from loramux_worker.scheduler import AdapterKey, AdapterPolicy, FairQueue, Policies
from unit.scheduler_support import make_sequence


class ReferenceQueue:
    """Algorithm 2 of the paper with policies and parking, by scans over everything, forgetting nobody."""

    def __init__(self, policies: Policies) -> None:
        self.policies = policies
        self.counters: defaultdict[str | None, float] = defaultdict(float)
        self.running: Counter[str | None] = Counter()
        self.held: set[str | None] = set()
        self.since: dict[str | None, int] = {}
        self.waiting: list[Sequence] = []
        self.arrivals: dict[int, int] = {}
        self.parked: set[AdapterKey] = set()
        self.active: set[str | None] = set()
        self.last_left: str | None = "nobody"
        self.clock = 0

    def refresh(self) -> None:
        clients = {s.adapter_key and s.adapter_key[0] for s in self.waiting if s.adapter_key not in self.parked}
        active = {client for client in clients if client not in self.held and self.running[client] < self.most(client)}
        for client in active - self.active:
            others = [self.counters[other] for other in self.active]
            self.counters[client] = max(self.counters[client], min(others, default=self.counters[self.last_left]))
            self.clock += 1
            self.since[client] = self.clock
        for client in self.active - active:
            self.last_left = client
        self.active = active

    def most(self, client: str | None) -> float:
        most = self.policies.of(client).max_running
        return float("inf") if most is None else most

    def push(self, sequence: Sequence) -> None:
        self.arrivals.setdefault(sequence.sequence_id, len(self.arrivals))
        self.waiting.append(sequence)
        self.refresh()

    def take(self, sequence: Sequence) -> None:
        self.waiting.remove(sequence)
        self.parked &= {s.adapter_key for s in self.waiting if s.adapter_key is not None}
        self.refresh()

    def order(self) -> list[Sequence]:
        """The next sequence of each active client, in fair order."""
        heads = []
        for client in sorted(self.active, key=lambda client: (self.counters[client], self.since[client])):
            runnable = [
                s
                for s in self.waiting
                if (s.adapter_key and s.adapter_key[0]) == client and s.adapter_key not in self.parked
            ]
            heads.append(
                min(
                    runnable,
                    key=lambda s: (-s.priority, 0 if s.num_preemptions else 1, self.arrivals[s.sequence_id]),
                )
            )
        return heads


class FairQueueMachine(RuleBasedStateMachine):
    """Whatever happens, the queue gives the order that the reference gives."""

    adapters = st.sampled_from(["a", "b", "c", "d", None])
    revisions = st.sampled_from(["r1", "r2"])

    policies = Policies(
        [
            AdapterPolicy("a", weight=0.5),
            AdapterPolicy("b", weight=4.0, max_running=1),
            AdapterPolicy("c", weight=2.0, max_running=2),
        ]
    )

    def __init__(self) -> None:
        super().__init__()
        self.queue = FairQueue(self.policies)
        self.reference = ReferenceQueue(self.policies)
        self.running: list[Sequence] = []
        self.num_sequences = 0

    @rule(adapter_id=adapters, revision=revisions, priority=st.integers(0, 2))
    def push(self, adapter_id: str | None, revision: str, priority: int) -> None:
        sequence = make_sequence(self.num_sequences, adapter_id, revision=revision, priority=priority)
        self.num_sequences += 1
        self.queue.push(sequence)
        self.reference.push(sequence)

    @precondition(lambda self: self.reference.active)
    @rule(num_skipped=st.integers(0, 3), service=st.integers(0, 40))
    def admit(self, num_skipped: int, service: int) -> None:
        for _ in range(min(num_skipped, len(self.reference.active) - 1)):
            self.queue.set_aside()
        lane = self.queue.peek()
        assert lane is not None
        sequence = lane.head
        self.queue.admit(lane)
        self.queue.restore()
        self.reference.running[lane.client.adapter_id] += 1
        self.reference.take(sequence)
        self.running.append(sequence)
        self.charge_client(lane.client.adapter_id, service)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), service=st.integers(0, 40))
    def charge(self, data: st.DataObject, service: int) -> None:
        key = data.draw(st.sampled_from(self.running)).adapter_key
        self.charge_client(key and key[0], service)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def requeue(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.running))
        self.running.remove(sequence)
        sequence.num_preemptions += 1
        self.queue.requeue(sequence)
        self.reference.running[sequence.adapter_key and sequence.adapter_key[0]] -= 1
        self.reference.push(sequence)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.running))
        self.running.remove(sequence)
        self.queue.remove(sequence)
        self.reference.running[sequence.adapter_key and sequence.adapter_key[0]] -= 1
        self.reference.refresh()

    @precondition(lambda self: self.reference.waiting)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(self.reference.waiting))
        self.queue.remove(sequence)
        self.reference.take(sequence)

    @rule(data=st.data())
    def park(self, data: st.DataObject) -> None:
        keys = sorted({s.adapter_key for s in self.reference.waiting if s.adapter_key is not None})
        if keys:
            key = data.draw(st.sampled_from(keys))
            self.queue.park(key)
            self.reference.parked.add(key)
            self.reference.refresh()

    @precondition(lambda self: self.reference.parked)
    @rule(data=st.data())
    def unpark(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.reference.parked)))
        self.queue.unpark(key)
        self.reference.parked.remove(key)
        self.reference.refresh()

    @precondition(lambda self: self.reference.active)
    @rule()
    def hold(self) -> None:
        lane = self.queue.peek()
        assert lane is not None
        self.queue.hold(lane.client)
        self.reference.held.add(lane.client.adapter_id)
        self.reference.refresh()

    @precondition(lambda self: self.reference.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from(sorted(self.reference.held, key=str)))
        self.queue.release(client)
        self.reference.held.remove(client)
        self.reference.refresh()

    def charge_client(self, adapter_id: str | None, service: int) -> None:
        self.queue.charge(adapter_id, service)
        self.reference.counters[adapter_id] += service / self.policies.of(adapter_id).weight

    @invariant()
    def agrees_with_the_reference(self) -> None:
        self.queue.check_integrity()
        assert len(self.queue) == len(self.reference.waiting)
        order = []
        while (lane := self.queue.peek()) is not None:
            order.append(lane.head)
            self.queue.set_aside()
        self.queue.restore()
        assert order == self.reference.order()
        for client in self.reference.active:
            assert self.queue.counter(client) == self.reference.counters[client]


TestFairQueueMachine = FairQueueMachine.TestCase
TestFairQueueMachine.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
