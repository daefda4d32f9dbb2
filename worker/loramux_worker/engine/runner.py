"""One step on the device: chunks of sequences in, sampled tokens out."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from loramux_kernels import AttentionBatch
from loramux_worker.adapters.residency import AdapterResidency
from loramux_worker.engine.sampler import SampledToken, Sampler
from loramux_worker.engine.sequence import Sequence
from loramux_worker.model.context import LoraPlan
from loramux_worker.model.loader import ServedModel
from loramux_worker.model.lora_layers import AdapterRun, lora_plan
from loramux_worker.scheduler.scheduler import Chunk, Step


class StepResult(NamedTuple):
    """A token for each sequence that has caught up in the step; the others only read a chunk of their prompt."""

    sequences: list[Sequence]
    tokens: list[SampledToken]


class Runner:
    """Owns the paged KV cache on the device and runs packed batches over it."""

    def __init__(self, model: ServedModel, adapters: AdapterResidency, num_blocks: int, block_size: int) -> None:
        self._model = model
        self._adapters = adapters
        self._block_size = block_size
        self._sampler = Sampler(model.vocab_size, model.device)
        shape = (num_blocks, model.num_kv_heads, block_size, model.head_dim)

        # zeros, not empty: a masked position still meets its value, and 0 · NaN is NaN
        def cache() -> list[Tensor]:
            return [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(model.num_layers)]

        model.context.key_caches, model.context.value_caches = cache(), cache()

    def forget(self, sequence: Sequence) -> None:
        """Release what the sampler keeps for a sequence that ended."""
        self._sampler.forget(sequence.sequence_id)

    def run(self, step: Step) -> StepResult:
        """Run the chunks of a step as one packed batch and sample where a sequence has caught up."""
        chunks = sorted(step.chunks, key=self._slot)  # rows of one adapter next to each other
        self._prepare(chunks)
        ids = [t for c in chunks for t in _chunk_tokens(c)]
        positions = [p for s, n in chunks for p in range(s.num_computed_tokens, s.num_computed_tokens + n)]
        rows, sequences = _sampling_rows(chunks)
        logits = self._model(self._tensor(ids), self._tensor(positions), self._tensor(rows))
        if not sequences:
            return StepResult([], [])
        return StepResult(sequences, self._sampler(logits, sequences))

    def _prepare(self, chunks: list[Chunk]) -> None:
        """Leave the layout of the batch where the layers look for it."""
        context = self._model.context
        context.attention = self._attention_batch(chunks)
        context.lora = self._plan([(s, n) for s, n in chunks])
        context.lora_head = self._plan([(c.sequence, 1) for c in chunks if c.samples])

    def _plan(self, runs: list[tuple[Sequence, int]]) -> LoraPlan | None:
        merged: list[AdapterRun] = []
        start, last = 0, -1
        for sequence, rows in runs:
            slot = self._slot(Chunk(sequence, rows))
            if slot >= 0:
                if slot == last:
                    merged[-1] = merged[-1]._replace(end=start + rows)
                else:
                    merged.append(AdapterRun(start, start + rows, self._adapters.tiles(slot)))
            last = slot
            start += rows
        return lora_plan(len(self._model.targets), merged)

    def _slot(self, chunk: Chunk) -> int:
        """The pool slot of the chunk's adapter; the base model sorts first."""
        key = chunk.sequence.adapter_key
        return -1 if key is None else self._adapters.slot(key)

    def _attention_batch(self, chunks: list[Chunk]) -> AttentionBatch:
        size = self._block_size
        slots: list[int] = []
        for sequence, num_tokens in chunks:
            table, first = sequence.block_table, sequence.num_computed_tokens
            slots += [table[p // size] * size + p % size for p in range(first, first + num_tokens)]
        most = max(len(c.sequence.block_table) for c in chunks)
        tables = [c.sequence.block_table + [0] * (most - len(c.sequence.block_table)) for c in chunks]
        return AttentionBatch(
            query_lens=tuple(c.num_tokens for c in chunks),
            context_lens=tuple(c.sequence.num_computed_tokens + c.num_tokens for c in chunks),
            block_tables=self._tensor(tables),
            slot_mapping=self._tensor(slots),
        )

    def _tensor(self, values: list[int] | list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._model.device)


def _chunk_tokens(chunk: Chunk) -> list[int]:
    first = chunk.sequence.num_computed_tokens
    return chunk.sequence.tokens(first, first + chunk.num_tokens)


def _sampling_rows(chunks: list[Chunk]) -> tuple[list[int], list[Sequence]]:
    """The last row of every sequence whose chunk reaches its newest token."""
    rows: list[int] = []
    sequences: list[Sequence] = []
    end = 0
    for chunk in chunks:
        end += chunk.num_tokens
        if chunk.samples:
            rows.append(end - 1)
            sequences.append(chunk.sequence)
    return rows, sequences
