"""What a step's chunks become on the host, against a row-by-row construction of the same."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loramux_kernels.lora_plan import NO_ADAPTER, Segment, divide, lora_units
from loramux_worker.engine.block_tables import BlockTables
from loramux_worker.engine.in_flight import InFlightStep
from loramux_worker.engine.inputs import InputBuffers, StepInputs, StepShape
from loramux_worker.engine.pending_sample import PendingSample
from loramux_worker.engine.protocol import SamplingParameters
from loramux_worker.engine.sequence import PENDING_TOKEN, Sequence
from loramux_worker.engine.step_plan import StepPlan, cut, fill
from loramux_worker.scheduler.step import Chunk

BLOCK_SIZE, MOST_BLOCKS, SPARE_BLOCK = 4, 8, 50
RANKS = np.array([8, 64, 128, 4], np.int32)  # of the slots; the work on one is divided
CPU = torch.device("cpu")
STALE = -99  # what the buffer holds of a step before


@dataclass(frozen=True)
class Case:
    """A step in the order of the scheduler, and the step before it where some inputs are still to be sampled."""

    chunks: list[Chunk]
    slots: list[int]
    previous: InFlightStep | None

    def plan(self) -> StepPlan:
        slots = {chunk.sequence.sequence_id: slot for chunk, slot in zip(self.chunks, self.slots, strict=True)}
        return StepPlan.of(self.chunks, lambda chunk: slots[chunk.sequence.sequence_id])


@st.composite
def cases(draw: st.DrawFn) -> Case:
    chunks, pending, slots = [], [], []
    blocks = iter(draw(st.permutations(range(SPARE_BLOCK))))
    for sequence_id in range(draw(st.integers(1, 6))):
        prompt = draw(st.lists(st.integers(1, 900), min_size=1, max_size=12))
        generated = draw(st.lists(st.integers(1, 900), max_size=6))
        sequence = Sequence(sequence_id, prompt, SamplingParameters(50), generated_token_ids=generated)
        if draw(st.booleans()):
            generated.append(PENDING_TOKEN)
            sequence.num_computed_tokens = sequence.num_tokens - 1
            pending.append(sequence)
        else:
            sequence.num_computed_tokens = draw(st.integers(0, sequence.num_tokens - 1))
        num_tokens = draw(st.integers(1, sequence.num_uncomputed_tokens))
        held = -(-(sequence.num_computed_tokens + num_tokens) // BLOCK_SIZE)
        sequence.block_table = [next(blocks) for _ in range(held)]
        chunks.append(Chunk(sequence, num_tokens))
        slots.append(draw(st.integers(NO_ADAPTER, 3)))
    sampled = draw(st.permutations(pending))
    previous = InFlightStep(sampled, PendingSample(torch.zeros(len(sampled), dtype=torch.int64))) if pending else None
    return Case(chunks, slots, previous)


def filled(plan: StepPlan, shape: StepShape, segments: list[Segment], previous: InFlightStep | None) -> StepInputs:
    tables = BlockTables(8, MOST_BLOCKS, SPARE_BLOCK, CPU)
    tables.row_of(Sequence(1000, [1], SamplingParameters(1), block_table=[0]))  # so that rows are not 0, 1, 2 …
    inputs = InputBuffers(StepShape(256, 32, segments=256), 8, CPU).begin(shape)
    for values in inputs.host.values():
        values[:] = STALE
    fill(inputs, plan, segments, tables, RANKS, BLOCK_SIZE, previous)
    rows = {c.sequence.sequence_id: tables.row_of(c.sequence) for c in plan.chunks}
    assert inputs.host["table_rows"][: len(plan.chunks)].tolist() == list(rows.values())
    return inputs


def naive(plan: StepPlan, previous: InFlightStep | None) -> dict[str, list[int]]:
    """The inputs of the rows that are there, one at a time."""
    names = ("ids", "sources", "positions", "slot_mapping", "adapters", "context_lens", "logit_rows")
    out: dict[str, list[int]] = {name: [] for name in names}
    out["query_starts"] = [0]
    for (sequence, num_tokens), slot in zip(plan.chunks, plan.slots, strict=True):
        everything = sequence.prompt_token_ids + sequence.generated_token_ids
        first = sequence.num_computed_tokens
        for position in range(first, first + num_tokens):
            token = everything[position]
            out["ids"].append(0 if token == PENDING_TOKEN else token)
            is_late = token == PENDING_TOKEN and previous is not None
            out["sources"].append(previous.sequences.index(sequence) if is_late else -1)  # type: ignore[union-attr]
            out["positions"].append(position)
            block = sequence.block_table[position // BLOCK_SIZE]
            out["slot_mapping"].append(block * BLOCK_SIZE + position % BLOCK_SIZE)
            out["adapters"].append(slot)
        out["query_starts"].append(len(out["ids"]))
        out["context_lens"].append(first + num_tokens)
        if first + num_tokens == len(everything):
            out["logit_rows"].append(len(out["ids"]) - 1)
    return out


@given(case=cases(), spare_rows=st.integers(0, 5), spare_sequences=st.integers(0, 3), spare_segments=st.integers(0, 3))
def test_inputs_of_a_packed_batch(case: Case, spare_rows: int, spare_sequences: int, spare_segments: int) -> None:
    plan = case.plan()
    tokens = sum(n for _, n in case.chunks)
    assert plan.num_tokens == tokens
    segments = divide(cut(plan.runs(), 3), RANKS, 100)
    shape = StepShape(
        tokens + spare_rows,
        len(case.chunks) + spare_sequences,
        segments=len(segments) + spare_segments,
        rows_in_segment=3,
        most_query_tokens=tokens,
    )
    inputs = filled(plan, shape, segments, case.previous)
    padding = {
        "ids": 0,
        "sources": -1,
        "positions": 0,
        "slot_mapping": SPARE_BLOCK * BLOCK_SIZE,
        "adapters": NO_ADAPTER,
        "query_starts": tokens,  # a sequence without a token
        "context_lens": 0,
        "logit_rows": 0,
    }
    for name, values in naive(plan, case.previous).items():
        there = inputs.host[name].tolist()
        assert there == values + [padding[name]] * (len(there) - len(values)), name
    assert inputs.host["table_rows"][len(case.chunks) :].tolist() == [8] * spare_sequences, "the spare row"
    columns = inputs.host["segments"].reshape(4, -1).T.tolist()
    assert columns[: len(segments)] == [list(segment) for segment in segments]
    assert all(start == end for start, end, *_ in columns[len(segments) :]), "the spare ones are empty"


@given(case=cases(), spare_rows=st.integers(0, 5))
def test_units_of_a_step_row_by_row(case: Case, spare_rows: int) -> None:
    plan = case.plan()
    shape = StepShape(plan.num_tokens + spare_rows, len(case.chunks), divided=True, most_query_tokens=9)
    inputs = filled(plan, shape, [], case.previous)
    expected = lora_units(inputs.host["adapters"], RANKS, shape.units)
    assert inputs.host["num_units"].tolist() == [len(expected)]
    assert inputs.host["units"][: len(expected)].tolist() == expected.tolist()
    assert (inputs.host["units"][len(expected) :] == -1).all()


def test_an_empty_step_is_padding_alone() -> None:
    shape = StepShape(8, 4, segments=2, rows_in_segment=16, most_query_tokens=8)
    inputs = filled(StepPlan([], []), shape, [], None)
    assert not inputs.host["query_starts"].any(), "no sequence has a row"
    assert (inputs.host["slot_mapping"] == SPARE_BLOCK * BLOCK_SIZE).all()
    assert (inputs.host["table_rows"] == 8).all()
    assert not any((values == STALE).any() for name, values in inputs.host.items() if name != "num_units")
    inputs = filled(StepPlan([], []), StepShape(8, 4, divided=True), [], None)
    assert inputs.host["num_units"].tolist() == [8], "a unit for each row, which finds no adapter"


@given(case=cases())
def test_rows_of_one_adapter_lie_next_to_each_other(case: Case) -> None:
    plan = case.plan()
    assert plan.has_adapters == any(slot != NO_ADAPTER for slot in case.slots)
    assert sorted(c.sequence.sequence_id for c in plan.chunks) == [c.sequence.sequence_id for c in case.chunks]
    runs = plan.runs()
    assert [run.start for run in runs] == [0, *(run.end for run in runs[:-1])]
    assert runs[-1].end == plan.num_tokens
    assert [run.slot for run in runs] == sorted(set(case.slots))
    of_row = np.repeat(plan.slots, plan.lengths).tolist()
    assert [run.slot for run in runs for _ in range(run.start, run.end)] == of_row
    sampling = [slot for chunk, slot in zip(plan.chunks, plan.slots, strict=True) if chunk.samples]
    assert [run.slot for run in plan.sampled_runs() for _ in range(run.start, run.end)] == sampling


@given(case=cases(), most=st.integers(1, 20))
def test_pieces_of_runs_cover_them(case: Case, most: int) -> None:
    runs = case.plan().runs()
    pieces = cut(runs, most)
    assert all(0 < piece.end - piece.start <= most for piece in pieces)
    covered = [(row, piece.slot) for piece in pieces for row in range(piece.start, piece.end)]
    assert covered == [(row, run.slot) for run in runs for row in range(run.start, run.end)]
    assert len(pieces) == sum(-(-(run.end - run.start) // most) for run in runs)


def test_a_placeholder_without_a_step_in_flight_is_a_bug() -> None:
    sequence = Sequence(0, [1], SamplingParameters(5), generated_token_ids=[PENDING_TOKEN], num_computed_tokens=1)
    sequence.block_table = [0]
    with pytest.raises(AssertionError):
        filled(StepPlan([Chunk(sequence, 1)], [NO_ADAPTER]), StepShape(1, 1), [], None)


def test_a_shape_without_segments_has_none() -> None:
    shape = StepShape(4, 2)
    assert "segments" in shape.sizes
    assert shape.sizes["segments"] == 0
    assert shape.sizes["units"] == 0
    assert replace(shape, segments=3).sizes["segments"] == 12
    assert replace(shape, segments=3, divided=True).sizes["units"] == 0, "segments name their parts"
