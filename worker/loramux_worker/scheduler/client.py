"""Clients of the fair queue: an adapter, all its revisions together; or the base model."""

from __future__ import annotations

from loramux_worker.engine.sequence import Sequence
from loramux_worker.scheduler.policy import AdapterPolicy
from loramux_worker.scheduler.removable_heap import RemovableHeap
from loramux_worker.scheduler.tiers import AdapterKey


class Lane:
    """Waiting sequences of one revision of an adapter; parked while that revision is being loaded."""

    __slots__ = ("client", "key", "parked", "waiting")

    def __init__(self, client: Client, key: AdapterKey | None) -> None:
        self.client = client
        self.key = key
        self.parked = False
        self.waiting: RemovableHeap[Sequence] = RemovableHeap()

    @property
    def head(self) -> Sequence:
        """The sequence that is next in this lane. Raises IndexError when none waits."""
        return self.waiting.first()[1]


class Client:
    """One who shares the engine with the others, and the service it has had.

    `counter` is the virtual token counter: service over weight, lifted when the client becomes active. It is
    active while a sequence of it waits that could run, that is, in a lane that is not parked and while the client is
    below its limits; the lane with the next one of these is `ready_lane`.
    """

    __slots__ = (
        "_noted",
        "adapter_id",
        "counter",
        "in_heap",
        "in_idle_heap",
        "in_service",
        "is_held",
        "lanes",
        "order",
        "overtaken",
        "policy",
        "ready_lane",
        "weight",
    )

    def __init__(self, adapter_id: str | None, policy: AdapterPolicy, order: int) -> None:
        self.adapter_id = adapter_id
        self.policy = policy
        self.weight = policy.weight
        self.counter = 0.0
        self._noted = 0.0  # the part of the counter that is no new service: lifts, and what `take_service` told
        self.order = order  # among equal counters: whoever became active first
        self.lanes: dict[AdapterKey | None, Lane] = {}
        self.ready_lane: Lane | None = None
        self.in_service = 0  # sequences admitted and not yet finished
        self.overtaken = 0.0  # weighted tokens admitted past it since it was admitted or became active
        self.is_held = False  # until it may have more tokens
        self.in_heap = False
        self.in_idle_heap = False

    def charge(self, service: float) -> None:
        """Count service, in weighted tokens, that the client was given."""
        self.counter += service / self.weight

    def lift(self, floor: float) -> None:
        """Raise the counter to the floor, if it is below."""
        if self.counter < floor:
            self._noted += floor - self.counter
            self.counter = floor

    def take_service(self) -> float:
        """Weighted tokens that it was given since the last call."""
        service = (self.counter - self._noted) * self.weight
        self._noted = self.counter
        return service

    @property
    def num_waiting(self) -> int:
        """Its sequences that wait, parked or not."""
        return sum(len(lane.waiting) for lane in self.lanes.values())

    @property
    def is_idle(self) -> bool:
        """Nothing of it waits or runs."""
        return not self.lanes and not self.in_service

    def find_ready_lane(self) -> Lane | None:
        """The lane whose head is the client's next sequence; None when none may run."""
        most = self.policy.max_running
        if self.is_held or (most is not None and self.in_service >= most):
            return None
        ready = [lane for lane in self.lanes.values() if lane.waiting and not lane.parked]
        if len(ready) > 1:
            return min(ready, key=lambda lane: lane.waiting.first()[0])
        return ready[0] if ready else None
