"""The policies that are compared, behind one protocol: ours is the product's own scheduler, the others are rivals.

The rivals batch as ours does (decoding first, then chunks of prompts, new sequences while there is room) and pass over
what finds no room or is being loaded; they differ only in whose turn it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from heapq import heapify, heappop, heappush
from itertools import count
from typing import Protocol

from loramux_worker.engine.kv_cache import BlockPool
from loramux_worker.engine.sequence import Sequence, SequenceStatus
from loramux_worker.scheduler import AdapterKey, AdapterTiers, Scheduler, SchedulerConfig, Step
from loramux_worker.scheduler.batch import Batch, Joining
from loramux_worker.scheduler.client import Client, Lane
from loramux_worker.scheduler.policy import AdapterPolicy
from loramux_worker.scheduler.step import StepDraft


class Policy(Protocol):
    """What the simulator asks of whoever makes the steps."""

    @property
    def num_running(self) -> int: ...

    @property
    def num_waiting(self) -> int: ...

    def add(self, sequence: Sequence) -> None: ...

    def adapter_loaded(self, key: AdapterKey) -> None: ...

    def schedule(self, now: float) -> Step: ...

    def advance(self, step: Step) -> None: ...

    def finish(self, sequence: Sequence) -> None: ...


def ours(config: SchedulerConfig, blocks: BlockPool, tiers: AdapterTiers, **knobs: float) -> Policy:
    """The product's scheduler."""
    return Scheduler(replace(config, **knobs), blocks, tiers)  # type: ignore[arg-type]


class Rival(ABC):
    """Continuous batching whose `order` says which lanes to try, the first first."""

    def __init__(self, config: SchedulerConfig, blocks: BlockPool, tiers: AdapterTiers) -> None:
        self._config = config
        self._tiers = tiers
        self._batch = Batch(config, blocks, tiers)
        self._lanes: dict[AdapterKey, Lane] = {}
        self._arrivals = count()
        self._num_waiting = 0
        self.now = 0.0

    @property
    def num_running(self) -> int:
        return len(self._batch)

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @abstractmethod
    def order(self) -> Iterable[Lane]:
        """Lanes to look at in this step; one that gets a sequence in is asked for again if it is yielded again."""

    def admitted(self, lane: Lane) -> None:  # noqa: B027 - not every policy counts
        """A sequence of the lane was taken."""

    def add(self, sequence: Sequence) -> None:
        key = sequence.adapter_key
        assert key is not None
        lane = self._lanes.get(key)
        if lane is None:
            lane = self._lanes[key] = Lane(Client(key[0], AdapterPolicy("*"), len(self._lanes)), key)
        lane.waiting.push(sequence, (next(self._arrivals),))
        self._num_waiting += 1
        self._tiers.rank(key)

    def adapter_loaded(self, key: AdapterKey) -> None:  # noqa: B027 - a lane without its adapter is looked at anyway
        pass

    def schedule(self, now: float) -> Step:
        self.now = now
        draft = StepDraft(self._config.max_batched_tokens)
        seats = [seat.sequence for seat in self._batch.seats.values()]
        for sequence in sorted(seats, key=lambda s: s.num_uncomputed_tokens > 1):  # stable: else as they came
            grown = self._batch.grow(sequence)
            assert grown, "the simulated cache never runs short"
            draft.give(sequence)
        for lane in self.order():
            if not draft.tokens_left or self._batch.is_full:
                break
            joining = self._batch.join(lane)
            if joining is Joining.JOINED:
                sequence = lane.waiting.pop()
                self._num_waiting -= 1
                draft.give(sequence)
                self.admitted(lane)
            elif joining is Joining.NO_BLOCKS:
                break
        return draft.step()

    def advance(self, step: Step) -> None:
        for sequence, num_tokens in step.chunks:
            sequence.num_computed_tokens += num_tokens

    def finish(self, sequence: Sequence) -> None:
        self._batch.leave(sequence)
        sequence.status = SequenceStatus.FINISHED

    def _waiting_lanes(self) -> list[Lane]:
        return [lane for lane in self._lanes.values() if lane.waiting]


class FirstCome(Rival):
    """First come, first served, as vLLM does: who finds no room is passed over."""

    def order(self) -> Iterable[Lane]:
        return self._by_arrival(self._waiting_lanes())

    @staticmethod
    def _by_arrival(lanes: list[Lane]) -> Iterable[Lane]:
        """The lane of the oldest sequence again and again; a lane that could not go is left out."""
        heap = [(lane.waiting.first()[0], lane.client.order, lane) for lane in lanes]
        heapify(heap)
        while heap:
            lane = heappop(heap)[2]
            while lane.waiting and (not heap or lane.waiting.first()[0] < heap[0][0]):
                before = len(lane.waiting)
                yield lane
                if len(lane.waiting) == before:
                    break
            else:
                if lane.waiting:
                    heappush(heap, (lane.waiting.first()[0], lane.client.order, lane))


class RoundRobin(Rival):
    """One request of each adapter in turn, whatever it costs."""

    def __init__(self, config: SchedulerConfig, blocks: BlockPool, tiers: AdapterTiers) -> None:
        super().__init__(config, blocks, tiers)
        self._ring: deque[Lane] = deque()

    def order(self) -> Iterable[Lane]:
        known = set(map(id, self._ring))
        self._ring.extend(lane for lane in self._lanes.values() if lane.waiting and id(lane) not in known)
        failures = 0
        while self._ring and failures < len(self._ring):
            lane = self._ring.popleft()
            if not lane.waiting:
                continue
            self._ring.append(lane)
            before = len(lane.waiting)
            yield lane
            failures = failures + 1 if len(lane.waiting) == before else 0


class TimeSlice(FirstCome):
    """As LoRAX: requests of the active adapters as they came; after its slice an adapter makes room for others.

    As many adapters are active as the pool holds; one that was active for `slice_seconds` leaves when others wait for
    their turn. Its running sequences go on.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        blocks: BlockPool,
        tiers: AdapterTiers,
        *,
        max_active: int = 64,
        slice_seconds: float = 2.0,
    ) -> None:
        super().__init__(config, blocks, tiers)
        self._max_active = max_active
        self._slice_seconds = slice_seconds
        self._active: dict[AdapterKey, float] = {}  # since when, the oldest first
        self._pending: deque[AdapterKey] = deque()

    def order(self) -> Iterable[Lane]:
        waiting = {key for key, lane in self._lanes.items() if lane.waiting}
        self._active = {key: since for key, since in self._active.items() if key in waiting}
        known = self._active.keys() | set(self._pending)
        self._pending.extend(key for key in self._lanes if key in waiting and key not in known)
        for key, since in list(self._active.items()):
            if self._pending and self.now - since >= self._slice_seconds and len(self._active) >= self._max_active:
                del self._active[key]
                self._pending.append(key)
        while self._pending and len(self._active) < self._max_active:
            key = self._pending.popleft()
            if key in waiting:
                self._active[key] = self.now
        return self._by_arrival([self._lanes[key] for key in self._active])
