"""One step on the device: chunks of sequences in, tokens out that are still to be sampled when the call returns."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from loramux_kernels import LoraWeights
from loramux_kernels.lora_plan import LARGE_RANK, NO_ADAPTER, Segment, divide
from loramux_kernels.pending_tokens import pending_tokens
from loramux_worker.adapters.residency import AdapterResidency
from loramux_worker.engine.block_tables import BlockTables
from loramux_worker.engine.graphs import ROWS_IN_SEGMENT, SPARE_SEGMENTS, GraphKey, StepGraphs, prefers_segments
from loramux_worker.engine.in_flight import InFlightStep
from loramux_worker.engine.inputs import InputBuffers, StepInputs, StepShape
from loramux_worker.engine.pending_sample import PendingSample
from loramux_worker.engine.sampler import Sampler
from loramux_worker.engine.sequence import Sequence
from loramux_worker.engine.step_plan import SlotRun, StepPlan, cut, fill
from loramux_worker.model.context import OwnRun, StepBatch
from loramux_worker.model.loader import ServedModel
from loramux_worker.model.step_lora import AdapterRun, PooledLora, RunsLora
from loramux_worker.scheduler.scheduler import Chunk, SchedulerConfig, Step

_LONG_SEGMENT = 64  # rows of one adapter that a program of the LoRA kernels takes in a large step
_MOST_UPDATES = 8192  # new blocks of a step that are sent in one copy


class _Form(NamedTuple):
    """How a step is computed."""

    shape: StepShape
    segments: list[Segment]  # empty where LoRA goes row by row
    graph: GraphKey | None  # None: kernel by kernel
    edges: bool  # an adapter touches the embedding or the head
    own: bool  # an adapter has more than LoRA


class Runner:
    """Owns the paged KV cache on the device and runs packed batches over it."""

    def __init__(
        self,
        model: ServedModel,
        adapters: AdapterResidency,
        num_blocks: int,
        block_size: int,
        limits: SchedulerConfig,
        max_lora_rank: int,
    ) -> None:
        self._model = model
        self._adapters = adapters
        self._block_size = block_size
        self._limits = limits
        self._sampler = Sampler(model.vocab_size, model.device)
        shape = (num_blocks + 1, model.num_kv_heads, block_size, model.head_dim)  # the last block is for padding

        # zeros, not empty: a masked position still meets its value, and 0 · NaN is NaN
        def cache() -> list[Tensor]:
            return [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(model.num_layers)]

        model.context.key_caches, model.context.value_caches = cache(), cache()
        most_sequences = limits.max_batch_sequences
        most_tokens = max(limits.max_batched_tokens, most_sequences)
        most_blocks = -(-limits.max_model_len // block_size)
        self._tables = BlockTables(most_sequences, most_blocks, num_blocks, model.device)
        largest = StepShape(most_tokens, most_sequences, segments=most_tokens + SPARE_SEGMENTS)
        self._buffers = InputBuffers(largest, _MOST_UPDATES, model.device)
        self._sampled = torch.zeros(most_sequences, dtype=torch.int64, device=model.device)
        tables = adapters.pool.tables
        self._weights = LoraWeights(
            adapters.pool.elements, tables.a_offsets, tables.b_offsets, tables.ranks, max_lora_rank
        )
        self._ranks = tables.host_largest
        self._logits: Tensor | None = None
        self.graphs: StepGraphs | None = None

    def capture_graphs(self) -> None:
        """Make CUDA graphs of small steps; without them every step is launched kernel by kernel."""
        most = self._limits.max_batch_sequences
        shape = (most, self._model.vocab_size)
        self._logits = torch.empty(shape, dtype=self._model.dtype, device=self._model.device)
        self.graphs = StepGraphs(self._prepare_capture, self._run_static, most, self._limits.max_batched_tokens)
        self.graphs.capture()
        self._warm_up()

    def _warm_up(self) -> None:
        """Run the largest step in each way that no graph has: kernels are compiled now, and want of memory shows."""
        most, sequences = self._limits.max_batched_tokens, self._limits.max_batch_sequences
        plain = StepShape(most, min(most, sequences), most_query_tokens=most)
        for divided in (False, True):
            by_row = replace(plain, divided=divided)
            for segment in (ROWS_IN_SEGMENT, _LONG_SEGMENT):
                room = -(-most // segment) + SPARE_SEGMENTS * divided
                by_segment = replace(by_row, segments=room, rows_in_segment=segment)
                self._run_padding(GraphKey(by_segment, lora=True))
            self._run_padding(GraphKey(by_row, lora=True))
        self._run_padding(GraphKey(plain, lora=False))

    def _run_padding(self, key: GraphKey) -> None:
        self._prepare_capture(key)
        self._run_static(key)

    def forget(self, sequence: Sequence) -> None:
        """Release what is kept for a sequence that ended."""
        self._sampler.forget(sequence.sequence_id)
        self._tables.release(sequence)

    @torch.inference_mode()
    def launch(self, step: Step, previous: InFlightStep | None) -> InFlightStep:
        """Enqueue the chunks of a step as one packed batch, and sampling where a sequence has caught up.

        `previous` is the step launched before, if its tokens were not read yet: this one may take inputs from it.
        """
        for sequence in step.preempted:
            self._tables.release(sequence)
        plan = StepPlan.of(step.chunks, self._slot)
        form = self._form(plan)
        inputs = self._buffers.begin(form.shape)
        fill(inputs, plan, form.segments, self._tables, self._ranks, self._block_size, previous)
        self._buffers.send(inputs, self._tables)
        if form.graph is not None and self.graphs is not None:
            logits = self.graphs.replay(form.graph)
        else:
            logits = self._model(self._batch(inputs, plan, form))
        sequences = [plan.chunks[i].sequence for i in plan.samples]
        if not sequences:
            return InFlightStep([], PendingSample(self._sampled[:0]))
        if form.shape.is_decode and len(sequences) < len(plan.chunks):  # some read one token and sample none
            logits = logits[inputs.device["logit_rows"][: len(sequences)].long()]
        sample = self._sampler(logits[: len(sequences)], sequences)
        self._sampled[: len(sequences)].copy_(sample.token_ids)
        return InFlightStep(sequences, sample)

    def _slot(self, chunk: Chunk) -> int:
        return self._adapters.slot(chunk.sequence.adapter_key)

    def _form(self, plan: StepPlan) -> _Form:
        """The shape of a step: a graph's where one has room, else its own."""
        most_query = max(plan.lengths)
        own = any(self._adapters.own(slot) is not None for slot in set(plan.slots) - {NO_ADAPTER})
        edges = plan.has_adapters and (own or self._touches_edges(plan))
        if not self._model.runs_kernels:
            return _Form(
                StepShape(plan.num_tokens, len(plan.chunks), most_query_tokens=most_query), [], None, edges, own
            )
        divided = plan.has_adapters and bool((self._ranks[plan.slots][np.array(plan.slots) >= 0] > LARGE_RANK).any())
        pieces = cut(plan.runs(), ROWS_IN_SEGMENT) if plan.has_adapters else []
        if self.graphs is not None and not edges:
            key = self.graphs.find(plan.num_tokens, len(plan.chunks), len(pieces), most_query, divided=divided)
            if key is not None:
                return _Form(key.shape, self._divide(pieces, key.shape), key, edges, own)
        shape = StepShape(plan.num_tokens, len(plan.chunks), divided=divided, most_query_tokens=most_query)
        if plan.has_adapters and prefers_segments(plan.num_tokens, len(pieces)):
            rows = ROWS_IN_SEGMENT
            if len(long := cut(plan.runs(), _LONG_SEGMENT)) * _LONG_SEGMENT <= 2 * plan.num_tokens:
                rows, pieces = _LONG_SEGMENT, long
            room = len(pieces) + SPARE_SEGMENTS if divided else len(pieces)
            shape = replace(shape, segments=room, rows_in_segment=rows)
        return _Form(shape, self._divide(pieces, shape), None, edges, own)

    def _divide(self, segments: list[Segment], shape: StepShape) -> list[Segment]:
        return divide(segments, self._ranks, shape.segments) if shape.divided and shape.segments else segments

    def _touches_edges(self, plan: StepPlan) -> bool:
        slots = sorted({slot for slot in plan.slots if slot != NO_ADAPTER})
        ranks = self._adapters.pool.tables.host_ranks
        return bool(ranks[slots][:, list(self._model.edge_targets)].any())

    def _batch(self, inputs: StepInputs, plan: StepPlan, form: _Form) -> StepBatch:
        """The batch of a step that no graph runs."""
        count = max(1, len(plan.samples))  # a batch that samples nothing has one row of logits that nobody reads
        rows = None if form.shape.is_decode else inputs.device["logit_rows"][:count].long()
        batch = self._static_batch(inputs, lora=False, rows=rows)
        if not plan.has_adapters:
            return batch
        if self._model.runs_kernels:
            batch = replace(batch, lora=PooledLora(self._weights, inputs.lora_rows()))
            if not form.edges:
                return batch
        all_rows = plan.runs()
        asked = all_rows if rows is None else plan.sampled_runs()
        lora = RunsLora(self._adapter_runs(all_rows))
        return replace(
            batch,
            lora=batch.lora or lora,
            lora_head=RunsLora(self._adapter_runs(asked)) if form.edges else None,
            lora_embedding=lora.tiles(self._model.embedding_target) if form.edges else (),
            own=self._own_runs(all_rows) if form.own else (),
            own_head=self._own_runs(asked) if form.own else (),
        )

    def _static_batch(self, inputs: StepInputs, *, lora: bool, rows: Tensor | None) -> StepBatch:
        return StepBatch(
            input_ids=pending_tokens(inputs.device["ids"], inputs.device["sources"], self._sampled),
            positions=inputs.device["positions"],
            rows=rows,
            attention=inputs.attention(self._tables.device),
            lora=PooledLora(self._weights, inputs.lora_rows()) if lora else None,
        )

    def _adapter_runs(self, runs: list[SlotRun]) -> list[AdapterRun]:
        return [
            AdapterRun(run.start, run.end, self._adapters.tiles(run.slot)) for run in runs if run.slot != NO_ADAPTER
        ]

    def _own_runs(self, runs: list[SlotRun]) -> tuple[OwnRun, ...]:
        return tuple(
            OwnRun(run.start, run.end, own, self._adapters.tiles(run.slot))
            for run in runs
            if run.slot != NO_ADAPTER and (own := self._adapters.own(run.slot)) is not None
        )

    def _prepare_capture(self, key: GraphKey) -> None:
        """Inputs that harm nobody: every row is padding."""
        inputs = self._buffers.begin(key.shape)
        fill(inputs, StepPlan([], []), [], self._tables, self._ranks, self._block_size, None)
        self._buffers.send(inputs, self._tables)

    @torch.inference_mode()
    def _run_static(self, key: GraphKey) -> Tensor:
        """What a graph does, kernel by kernel."""
        inputs = self._buffers.static(key.shape)
        rows = None if key.shape.is_decode else inputs.device["logit_rows"].long()
        assert self._logits is not None
        return self._model(self._static_batch(inputs, lora=key.lora, rows=rows), self._logits[: key.shape.sequences])
