"""A step's chunks in the order of their rows, and the inputs that follow from them. On the host alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loramux_kernels.lora_plan import NO_ADAPTER, Segment, lora_units
from loramux_worker.engine.block_tables import BlockTables
from loramux_worker.engine.in_flight import InFlightStep, pending_inputs
from loramux_worker.engine.inputs import StepInputs
from loramux_worker.engine.sequence import PENDING_TOKEN
from loramux_worker.scheduler.step import Chunk


class SlotRun(NamedTuple):
    """Rows `start` to `end` (exclusive) whose adapter is in one slot of the pool, or have none."""

    start: int
    end: int
    slot: int


@dataclass(frozen=True)
class StepPlan:
    """Chunks, sorted so that the rows of one adapter lie next to each other, the base model's first."""

    chunks: Sequence[Chunk]
    slots: Sequence[int]  # of each chunk's adapter in the pool

    @classmethod
    def of(cls, chunks: Sequence[Chunk], slot_of: Callable[[Chunk], int]) -> StepPlan:
        """The plan of a step's chunks; `slot_of` gives `NO_ADAPTER` for the base model."""
        slots = [slot_of(chunk) for chunk in chunks]
        order = sorted(range(len(chunks)), key=slots.__getitem__)
        return cls([chunks[i] for i in order], [slots[i] for i in order])

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of each chunk."""
        return [chunk.num_tokens for chunk in self.chunks]

    @cached_property
    def num_tokens(self) -> int:
        """Rows of the batch."""
        return sum(self.lengths)

    @cached_property
    def samples(self) -> list[int]:
        """The chunks that reach their sequence's newest token, so that the next one is sampled."""
        return [i for i, chunk in enumerate(self.chunks) if chunk.samples]

    @property
    def has_adapters(self) -> bool:
        """Whether any row has an adapter."""
        return bool(self.slots) and self.slots[-1] != NO_ADAPTER

    def runs(self) -> list[SlotRun]:
        """Rows by adapter, those without one too."""
        return _runs(self.slots, self.lengths)

    def sampled_runs(self) -> list[SlotRun]:
        """The same among the rows that are sampled."""
        return _runs([self.slots[i] for i in self.samples], [1] * len(self.samples))


def cut(runs: Sequence[SlotRun], most: int) -> list[Segment]:
    """The runs in pieces of at most `most` rows."""
    return [
        Segment(start, min(start + most, run.end), run.slot)
        for run in runs
        for start in range(run.start, run.end, most)
    ]


def fill(
    inputs: StepInputs,
    plan: StepPlan,
    segments: Sequence[Segment],
    tables: BlockTables,
    ranks: NDArray[np.int32],
    block_size: int,
    previous: InFlightStep | None,
) -> None:
    """Write the plan into the inputs on the host, and into what is left of them what harms nobody.

    `ranks` has the largest rank of each slot of the adapter pool.
    """
    tokens, sequences = plan.num_tokens, len(plan.chunks)
    computed = np.fromiter((c.sequence.num_computed_tokens for c in plan.chunks), np.int32, sequences)
    rows = np.fromiter((tables.row_of(c.sequence) for c in plan.chunks), np.int32, sequences)
    lengths = np.array(plan.lengths, np.int32)
    ends = np.cumsum(lengths, dtype=np.int32)
    owner = np.repeat(np.arange(sequences), lengths)
    positions = np.arange(tokens, dtype=np.int32) + (computed - ends + lengths)[owner]
    blocks = tables.host[rows[owner], positions // block_size]
    samples = np.array(plan.samples, np.int64)
    slots = np.array(plan.slots, np.int32)
    _put(inputs, "ids", np.array(_token_ids(plan), np.int32), 0)
    _put(inputs, "sources", _sources(plan, previous), -1)
    _put(inputs, "positions", positions, 0)
    _put(inputs, "slot_mapping", blocks * block_size + positions % block_size, tables.spare_block * block_size)
    _put(inputs, "adapters", slots[owner], NO_ADAPTER)
    _put(inputs, "query_starts", np.concatenate(([0], ends)), tokens)
    _put(inputs, "context_lens", computed + lengths, 0)
    _put(inputs, "table_rows", rows, tables.spare_row)
    _put(inputs, "logit_rows", ends[samples] - 1, 0)
    if inputs.shape.units:
        units = lora_units(inputs.host["adapters"], ranks, inputs.shape.units)
        inputs.host["num_units"][0] = len(units)
        _put(inputs, "units", units, -1)
    if inputs.shape.segments:
        padded = [*segments, *[Segment(0, 0, NO_ADAPTER)] * (inputs.shape.segments - len(segments))]
        inputs.host["segments"][:] = np.array(padded, np.int32).T.reshape(-1)


def _put(inputs: StepInputs, name: str, values: NDArray[np.integer], spare: int) -> None:
    target = inputs.host[name]
    target[: len(values)] = values
    target[len(values) :] = spare


def _token_ids(plan: StepPlan) -> list[int]:
    ids: list[int] = []
    for sequence, num_tokens in plan.chunks:
        first = sequence.num_computed_tokens
        if num_tokens == 1 and first + 1 == sequence.num_tokens and sequence.generated_token_ids:
            token = sequence.generated_token_ids[-1]
            ids.append(0 if token == PENDING_TOKEN else token)
        else:
            ids += sequence.tokens(first, first + num_tokens)
    return ids


def _sources(plan: StepPlan, previous: InFlightStep | None) -> NDArray[np.int32]:
    """The row of the last step that samples each row's token, -1 where it is known."""
    sources = np.full(plan.num_tokens, -1, np.int32)
    pending = pending_inputs(plan.chunks, previous)
    sources[pending.positions] = pending.rows
    return sources


def _runs(slots: Sequence[int], lengths: Sequence[int]) -> list[SlotRun]:
    runs: list[SlotRun] = []
    start = end = 0
    for slot, following, length in zip(slots, [*slots[1:], None], lengths, strict=False):
        end += length
        if following != slot:
            runs.append(SlotRun(start, end, slot))
            start = end
    return runs
