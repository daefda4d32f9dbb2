from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loramux_worker.engine.kv_cache import BlockPool


class BlockPoolMachine(RuleBasedStateMachine):
    """Any order of allocations and frees, beside a plain set of what is in use."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(24, 4)
        self.held: list[list[int]] = []

    @property
    def used(self) -> set[int]:
        return {block for blocks in self.held for block in blocks}

    @rule(num_blocks=st.integers(0, 30))
    def allocate(self, num_blocks: int) -> None:
        free = 24 - len(self.used)
        assert self.pool.can_allocate(num_blocks) == (num_blocks <= free)
        if num_blocks > free:
            with pytest.raises(RuntimeError, match=f"cannot allocate {num_blocks} blocks: {free} are free"):
                self.pool.allocate(num_blocks)
            return
        blocks = self.pool.allocate(num_blocks)
        assert len(set(blocks)) == num_blocks
        assert self.used.isdisjoint(blocks)
        assert all(0 <= block < 24 for block in blocks)
        self.held.append(blocks)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.pool.free(self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule(block=st.integers(-3, 30))
    def free_what_is_not_held(self, block: int) -> None:
        if block not in self.used:
            with pytest.raises(RuntimeError, match="not in use"):
                self.pool.free([block])

    @invariant()
    def counts_agree(self) -> None:
        self.pool.check_integrity()
        assert self.pool.num_used == len(self.used)
        assert self.pool.num_free == 24 - len(self.used)


TestBlockPool = BlockPoolMachine.TestCase
TestBlockPool.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize(("num_tokens", "num_blocks"), [(0, 0), (1, 1), (15, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_blocks_needed(num_tokens: int, num_blocks: int) -> None:
    assert BlockPool(8, 16).blocks_needed(num_tokens) == num_blocks


def test_a_block_freed_twice_is_an_error_even_within_one_call() -> None:
    pool = BlockPool(4, 16)
    blocks = pool.allocate(2)
    with pytest.raises(RuntimeError, match=f"block {blocks[0]} is not in use"):
        pool.free([blocks[0], blocks[0]])


def test_freed_blocks_are_handed_out_again() -> None:
    pool = BlockPool(3, 16)
    first = pool.allocate(3)
    pool.free(first)
    assert sorted(pool.allocate(3)) == sorted(first) == [0, 1, 2]
    assert not pool.can_allocate(1)


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 16), (-1, 16), (4, 0)])
def test_a_pool_without_blocks_is_refused(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ValueError, match="a pool needs blocks"):
        BlockPool(num_blocks, block_size)
