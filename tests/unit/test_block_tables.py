"""The block tables on the device: a row for every running sequence, and only what is new is sent."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loramux_worker.engine.block_tables import BlockTables
from loramux_worker.engine.protocol import SamplingParameters
from loramux_worker.engine.sequence import Sequence

MOST_SEQUENCES, MOST_BLOCKS, SPARE = 4, 6, 99
ELSEWHERE = torch.device("meta")  # memory of its own, so that changes must be sent


def make_sequence(sequence_id: int, blocks: list[int]) -> Sequence:
    return Sequence(sequence_id, [0], SamplingParameters(1), block_table=blocks)


class BlockTablesMachine(RuleBasedStateMachine):
    """Any order of sequences that come, grow, lose their blocks and go, beside a dict of what each should see."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = BlockTables(MOST_SEQUENCES, MOST_BLOCKS, SPARE, ELSEWHERE)
        self.on_device = np.full((MOST_SEQUENCES + 1, MOST_BLOCKS), SPARE, np.int32)
        self.sequences: dict[int, Sequence] = {}
        self.seen: dict[int, tuple[int, list[int]]] = {}  # row and blocks when it was last in a step
        self.changed: set[tuple[int, int]] = set()
        self.num_blocks = self.num_sequences = 0

    def new_blocks(self, count: int) -> list[int]:
        self.num_blocks += count
        return list(range(self.num_blocks - count, self.num_blocks))

    def draw(self, data: st.DataObject) -> Sequence:
        return self.sequences[data.draw(st.sampled_from(sorted(self.sequences)))]

    @precondition(lambda self: len(self.sequences) < MOST_SEQUENCES)
    @rule(num_blocks=st.integers(1, MOST_BLOCKS))
    def begin(self, num_blocks: int) -> None:
        sequence = make_sequence(self.num_sequences, self.new_blocks(num_blocks))
        self.sequences[sequence.sequence_id] = sequence
        self.num_sequences += 1

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def grow(self, data: st.DataObject) -> None:
        sequence = self.draw(data)
        room = MOST_BLOCKS - len(sequence.block_table)
        sequence.block_table += self.new_blocks(data.draw(st.integers(0, room)))

    @precondition(lambda self: self.sequences)
    @rule(data=st.data())
    def take_part_in_a_step(self, data: st.DataObject) -> None:
        sequence = self.draw(data)
        row = self.tables.row_of(sequence)
        had, known = self.seen.get(sequence.sequence_id, (row, []))
        assert row == had, "a sequence keeps its row"
        self.changed |= {(row, column) for column in range(len(known), len(sequence.block_table))}
        self.seen[sequence.sequence_id] = row, list(sequence.block_table)

    @precondition(lambda self: self.sequences)
    @rule(data=st.data(), comes_back=st.booleans())
    def lose_the_blocks(self, data: st.DataObject, comes_back: bool) -> None:
        """It ended, or was preempted and begins anew with others."""
        sequence = self.draw(data)
        self.tables.release(sequence)
        self.tables.release(sequence)  # of one that has no row nothing happens
        self.seen.pop(sequence.sequence_id, None)
        if comes_back:
            sequence.block_table[:] = self.new_blocks(data.draw(st.integers(1, MOST_BLOCKS)))
        else:
            del self.sequences[sequence.sequence_id]

    @rule()
    def send(self) -> None:
        positions, values = self.tables.drain()
        assert positions.dtype == values.dtype == np.int32
        assert {divmod(int(position), MOST_BLOCKS) for position in positions} == self.changed
        self.on_device.reshape(-1)[positions] = values
        self.changed.clear()
        for row, blocks in self.seen.values():
            assert self.on_device[row, : len(blocks)].tolist() == blocks

    @invariant()
    def rows_are_apart(self) -> None:
        rows = [row for row, _ in self.seen.values()]
        assert len(set(rows)) == len(rows)
        assert set(rows) <= set(range(MOST_SEQUENCES))
        for row, blocks in self.seen.values():
            assert self.tables.host[row, : len(blocks)].tolist() == blocks

    @invariant()
    def the_spare_row_is_nobodys(self) -> None:
        assert self.tables.spare_row == MOST_SEQUENCES
        for table in (self.tables.host, self.on_device):
            assert (table[self.tables.spare_row] == SPARE).all()


TestBlockTables = BlockTablesMachine.TestCase
TestBlockTables.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_cell_that_was_given_on_before_it_was_sent_is_the_new_owners() -> None:
    tables = BlockTables(1, MOST_BLOCKS, SPARE, ELSEWHERE)
    first, second = make_sequence(0, [1, 2, 3]), make_sequence(1, [4, 5])
    tables.row_of(first)
    tables.release(first)
    assert tables.row_of(second) == 0
    sent: dict[int, set[int]] = {}
    for position, value in zip(*tables.drain(), strict=True):
        sent.setdefault(int(position), set()).add(int(value))
    assert sent == {0: {4}, 1: {5}, 2: {3}}, "one value a cell, so that the order of the writes does not matter"
    assert not len(tables.drain()[0])


def test_on_a_cpu_both_are_the_same_memory() -> None:
    tables = BlockTables(2, MOST_BLOCKS, SPARE, torch.device("cpu"))
    row = tables.row_of(make_sequence(0, [7, 8]))
    assert tables.device[row].tolist() == [7, 8, *[SPARE] * (MOST_BLOCKS - 2)]
    assert not len(tables.drain()[0]), "there is nothing to send"
