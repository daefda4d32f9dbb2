"""Is this model right in packed, chunked, paged batches? Asked once at the start, by running it.

Two short sequences go through the served path, in uneven chunks side by side, and their logits are compared with the
same weights under Hugging Face's own eager attention, one sequence at a time. What differs is refused before it can
answer anybody wrongly.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from loramux_kernels import AttentionBatch
from loramux_worker.errors import ConfigurationError
from loramux_worker.model.attention import IMPLEMENTATION, UnsupportedAttention
from loramux_worker.model.context import StepBatch
from loramux_worker.model.loader import ServedModel

_LENGTHS = (13, 7)
_CHUNKS = ((5, 3), (7, 3), (1, 1))  # tokens of each sequence in each step: prefill, mixed, decode
_BLOCK_SIZE = 4

_TOLERANCE = {torch.float32: 2e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}


def check_model(model: ServedModel) -> None:
    """Compare the served path with Hugging Face's own.

    Raises:
        ConfigurationError: the logits differ, or the modelling code asks for an attention that we do not have.
    """
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(model.vocab_size, (n,), generator=generator).to(model.device) for n in _LENGTHS]
    name = type(model.module).__name__
    try:
        served = _served_logits(model, prompts)
    except UnsupportedAttention as error:
        raise ConfigurationError(f"--model: {name} is not served: {error}") from error
    finally:
        model.context.key_caches, model.context.value_caches = [], []
        model.context.batch = None
    expected = _eager_logits(model, prompts)
    difference = max(((s - e).norm() / e.norm()).item() for s, e in zip(served, expected, strict=True))
    if not difference <= _TOLERANCE[model.dtype]:
        raise ConfigurationError(
            f"--model: {name} is not served: its logits in packed batches are {difference:.1%} off Hugging Face's own"
        )


def _served_logits(model: ServedModel, prompts: list[Tensor]) -> list[Tensor]:
    """Float32 logits [length, vocabulary] of each prompt, read in chunks beside the other."""
    tables = torch.tensor([[3, 0, 5, 6], [1, 4, 2, 7]], device=model.device)
    shape = (tables.numel(), model.num_kv_heads, _BLOCK_SIZE, model.head_dim)
    for caches in (model.context.key_caches, model.context.value_caches):
        caches[:] = [torch.zeros(shape, dtype=model.dtype, device=model.device) for _ in range(model.num_layers)]
    done = [0, 0]
    pieces: list[list[Tensor]] = [[], []]
    for chunk in _CHUNKS:
        positions = [torch.arange(d, d + n, device=model.device) for d, n in zip(done, chunk, strict=True)]
        slots = [tables[i, p // _BLOCK_SIZE] * _BLOCK_SIZE + p % _BLOCK_SIZE for i, p in enumerate(positions)]
        done = [d + n for d, n in zip(done, chunk, strict=True)]
        batch = StepBatch(
            input_ids=torch.cat([prompts[i][p] for i, p in enumerate(positions)]),
            positions=torch.cat(positions).int(),
            rows=None,
            attention=_layout(chunk, done, tables, torch.cat(slots)),
        )
        logits = model(batch).float()
        for i, piece in enumerate(logits.split(list(chunk))):
            pieces[i].append(piece)
    return [torch.cat(p) for p in pieces]


def _layout(chunk: tuple[int, ...], done: list[int], tables: Tensor, slots: Tensor) -> AttentionBatch:
    """The step that ends with `done` tokens of each sequence in the cache."""

    def small(values: list[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=tables.device)

    return AttentionBatch(
        query_starts=small([0, *itertools.accumulate(chunk)]),
        context_lens=small(done),
        block_tables=tables.int(),
        table_rows=small(list(range(len(done)))),
        slot_mapping=slots.int(),
        most_query_tokens=max(chunk),
    )


@torch.inference_mode()
def _eager_logits(model: ServedModel, prompts: list[Tensor]) -> list[Tensor]:
    """The same logits by the modelling code alone."""
    model.module.set_attn_implementation("eager")  # type: ignore[operator]
    try:
        return [model.module(input_ids=p[None], use_cache=False).logits[0].float() for p in prompts]
    finally:
        model.module.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
