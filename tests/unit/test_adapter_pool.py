"""The gpu pool: whatever is loaded, moved, pinned and evicted, each slot shows its own adapter."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from loramux_worker.adapters import gpu_pool
from loramux_worker.adapters.extents import ExtentAllocator
from loramux_worker.adapters.gpu_pool import AdapterPool
from loramux_worker.adapters.host import HostAdapter
from pool_rig import CPU, TARGETS, adapter, check_contents, sized


class PoolMachine(RuleBasedStateMachine):
    """A model of the pool: a dict of what is in it, with pins. Who leaves is the policy's choice among the unpinned."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self.held: dict[int, HostAdapter] = {}
        self.pins: dict[int, int] = {}

    @initialize(capacity=st.integers(100, 700), max_slots=st.integers(1, 6), staging=st.sampled_from([1, 7, 64, 4096]))
    def make(self, capacity: int, max_slots: int, staging: int) -> None:
        original, gpu_pool._STAGING_ELEMENTS = gpu_pool._STAGING_ELEMENTS, staging
        self.pool = AdapterPool(capacity, len(TARGETS), max_slots, CPU, torch.float32)
        gpu_pool._STAGING_ELEMENTS = original
        self.capacity, self.max_slots = capacity, max_slots

    @rule(ranks=st.dictionaries(st.integers(0, 3), st.integers(1, 9), min_size=1))
    def load(self, ranks: dict[int, int]) -> None:
        self.number += 1
        new = adapter(self.number, ranks)
        size = new.layout.num_elements
        pinned = sum(loaded.layout.num_elements for slot, loaded in self.held.items() if self.pins[slot])
        num_pinned = sum(pins > 0 for pins in self.pins.values())
        slot = self.pool.load(new)
        if size + pinned > self.capacity or num_pinned == self.max_slots:
            assert slot is None
            return
        assert slot is not None, "there was room, as soon as what is not pinned is gone"
        gone = [s for s, loaded in self.held.items() if self.pool.slot_of(loaded.key) is None]
        assert not any(self.pins[s] for s in gone)
        sizes = [self.held.pop(s).layout.num_elements for s in gone]
        self.pins = {s: pins for s, pins in self.pins.items() if s not in gone}
        left = self.capacity - size - sum(loaded.layout.num_elements for loaded in self.held.values())
        full = len(self.held) + 1 == self.max_slots
        assert not gone or full or left < max(sizes), "no more left than had to"
        assert slot not in self.held
        self.held[slot], self.pins[slot] = new, 0

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def load_again(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.held)))
        assert self.pool.load(self.held[slot]) == slot

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def pin(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(self.held)))
        self.pool.pin(self.held[slot].key)
        self.pins[slot] += 1

    @precondition(lambda self: any(self.pins.values()))
    @rule(data=st.data())
    def unpin(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(slot for slot, pins in self.pins.items() if pins)))
        self.pool.unpin(self.held[slot].key)
        self.pins[slot] -= 1

    @precondition(lambda self: not all(self.pins.values()))
    @rule(data=st.data())
    def evict(self, data: st.DataObject) -> None:
        slot = data.draw(st.sampled_from(sorted(slot for slot, pins in self.pins.items() if not pins)))
        self.pool.evict(self.held[slot].key)
        del self.held[slot], self.pins[slot]

    @invariant()
    def contents_are_right(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check_integrity()
            check_contents(self.pool, self.held)
            used = sum(loaded.layout.num_elements for loaded in self.held.values())
            assert self.pool.bytes_used == 4 * used
            assert self.pool.num_adapters == len(self.held)


TestPool = PoolMachine.TestCase
TestPool.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_no_fragmentation_at_true_ranks() -> None:
    """Ranks 4 to 128 side by side: whatever was evicted before, the pool fills to its last element."""
    shuffle = random.Random(0)
    pool = AdapterPool(16 * 1000, len(TARGETS), 1000, CPU, torch.float32)
    held: dict[int, HostAdapter] = {}
    for number in range(400):
        new = sized(number, shuffle.choice([4, 8, 16, 32, 64, 128]))
        free = pool.capacity_elements - pool.bytes_used // 4
        while free < new.layout.num_elements:
            slot = shuffle.choice(sorted(held))
            free += held[slot].layout.num_elements
            pool.evict(held.pop(slot).key)
        evictions = pool.evictions_total
        slot = pool.load(new)
        assert slot is not None
        assert pool.evictions_total == evictions, "free elements anywhere are enough"
        held[slot] = new
    assert pool.moves_total > 0
    pool.check_integrity()
    check_contents(pool, held)


def test_counts_and_evicted_slots_mean_no_adapter() -> None:
    pool = AdapterPool(16 * 4, len(TARGETS), 8, CPU, torch.float32)
    first = pool.load(sized(1, 2))
    assert first is not None
    assert pool.load(sized(2, 2)) is not None
    assert pool.find(("a1", "r")) == first
    assert pool.find(("a3", "r")) is None
    assert pool.load(sized(3, 1)) is not None  # evicts a2, which was not used again
    assert pool.slot_of(("a2", "r")) is None
    assert (pool.hits_total, pool.misses_total, pool.evictions_total) == (1, 3, 1)
    pool.evict(("a1", "r"))
    assert not pool.tables.ranks[first].any()
    assert pool.rank_of(("a3", "r")) == 1
    assert pool.rank_of(("a1", "r")) is None


def test_who_is_needed_leaves_last_and_of_those_who_is_served_last() -> None:
    turns = {"a1": 5.0, "a2": 9.0, "a3": 1.0}

    class Waiting:
        def waits(self, key: tuple[str, str]) -> bool:
            return key[0] in turns

        def turn(self, adapter_id: str | None) -> float:
            return turns[adapter_id or ""]

    pool = AdapterPool(4 * sized(0, 4).layout.num_elements, len(TARGETS), 8, CPU, torch.float32)
    pool.demand = Waiting()
    for number in (1, 0, 2, 3):
        pool.load(sized(number, 4))
    left = []
    for number in (4, 5, 6):
        before = set(pool.keys())
        pool.load(sized(number, 4))
        pool.pin(sized(number, 4).key)
        left += before - pool.keys()
        pool.check_integrity()
    assert left == [("a0", "r"), ("a2", "r"), ("a1", "r")]


def test_too_large_or_pinned_changes_nothing() -> None:
    pool = AdapterPool(16 * 4, len(TARGETS), 8, CPU, torch.float32)
    assert pool.load(sized(1, 2)) is not None
    pool.pin(("a1", "r"))
    assert pool.load(sized(2, 2)) is not None
    assert pool.load(sized(3, 5)) is None
    assert pool.load(sized(4, 3)) is None
    assert pool.slot_of(("a2", "r")) is not None
    with pytest.raises(AssertionError, match="is pinned"):
        pool.evict(("a1", "r"))
    pool.unpin(("a1", "r"))
    with pytest.raises(AssertionError, match="is not pinned"):
        pool.unpin(("a1", "r"))
    assert pool.load(sized(4, 3)) is not None


def test_moved_tiles_are_found_again() -> None:
    pool = AdapterPool(16 * 6, len(TARGETS), 8, CPU, torch.float32)
    held = {pool.load(sized(number, 2)): sized(number, 2) for number in range(3)}
    last = pool.slot_of(("a2", "r"))
    assert last is not None
    before = pool.tiles(last)[0]
    assert before is not None
    for number, slot in ((0, 0), (2, 2)):
        assert pool.slot_of((f"a{number}", "r")) == slot
    pool.evict(("a0", "r"))
    pool.evict(("a2", "r"))
    slot = pool.load(sized(3, 4))
    assert pool.moves_total == 1
    assert slot is not None
    check_contents(pool, {1: held[1], slot: sized(3, 4)})


def brute_force_cost(allocator: ExtentAllocator, size: int) -> int:
    """The fewest elements to carry so that some run of neighbours, closed up, leaves a hole of `size`."""
    taken = allocator.taken
    costs = []
    for first in range(len(taken) + 1):
        for last in range(first, len(taken) + 1):
            start = taken[first - 1].end if first else 0
            end = taken[last].offset if last < len(taken) else allocator.capacity
            carried = sum(extent.size for extent in taken[first:last])
            if end - start - carried >= size:
                costs.append(carried)
    return min(costs)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=1, max_size=12), st.data())
def test_plans_carry_the_fewest_elements(parts: list[tuple[int, bool]], data: st.DataObject) -> None:
    allocator = ExtentAllocator(sum(size for size, _ in parts) + data.draw(st.integers(0, 5)))
    cells: Tensor = torch.zeros(allocator.capacity)
    offsets = [(allocator.allocate(size), keep) for size, keep in parts]
    for offset, keep in offsets:
        assert offset is not None
        if not keep:
            allocator.free(offset)
    for i, extent in enumerate(allocator.taken):
        cells[extent.offset : extent.end] = i + 1
    if not allocator.num_free:
        return
    size = data.draw(st.integers(1, allocator.num_free))
    moves = allocator.plan_moves(size)
    best = brute_force_cost(allocator, size)
    assert sum(move.extent.size for move in moves) <= best
    for move in moves:
        assert move.to < move.extent.offset
        cells[move.to : move.to + move.extent.size] = cells[move.extent.offset : move.extent.end].clone()
        allocator.apply(move)
        allocator.check_integrity()
    for extent in allocator.taken:
        assert len(np.unique(cells[extent.offset : extent.end].numpy())) == 1, "a move wrote over another extent"
    assert allocator.allocate(size) is not None


@pytest.mark.gpu
def test_the_copy_into_a_full_pool_does_not_wait_for_steps_that_never_read_what_leaves() -> None:
    first, second = sized(1, 64), sized(2, 64)
    device = torch.device("cuda")
    pool = AdapterPool(first.layout.num_elements, len(TARGETS), 2, device, torch.float32)
    pinned = [HostAdapter(a.key, a.layout, a.run.pin_memory()) for a in (first, second)]
    assert pool.load(pinned[0]) is not None
    pool.pin(first.key)
    pool.unpin(first.key)
    torch.cuda.synchronize()
    torch.cuda._sleep(1 << 31)  # about a second: a step under way
    step = torch.cuda.Event()
    step.record()
    slot = pool.load(pinned[1])
    copied, _ = pool._being_copied[-1]
    copied.synchronize()
    assert not step.query(), "the copy was over first"
    assert slot is not None
    check_contents(pool, {slot: pinned[1]})


@pytest.mark.gpu
def test_the_copy_into_a_full_pool_waits_for_the_last_step_that_reads_what_leaves() -> None:
    first, second = sized(1, 64), sized(2, 64)
    device = torch.device("cuda")
    pool = AdapterPool(first.layout.num_elements, len(TARGETS), 2, device, torch.float32)
    pinned = [HostAdapter(a.key, a.layout, a.run.pin_memory()) for a in (first, second)]
    assert pool.load(pinned[0]) is not None
    pool.pin(first.key)
    torch.cuda._sleep(1 << 28)
    read = pool.elements.clone()
    pool.unpin(first.key)
    assert pool.load(pinned[1]) is not None
    assert torch.equal(read.cpu(), pinned[0].run)
