"""A whole attention of a decode step in one launch: rotation, KV store and attention of one new token a sequence.

The new key and value go to the paged cache and straight into the softmax, so nothing waits for a store. Where few
sequences have long contexts, several programs share one context and the last to finish combines their partial
softmaxes: Dao et al., "Flash-Decoding for long-context inference", 2023. Formulae: `rotary.py`, `paged_attention.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loramux_kernels.paged_attention import AttentionBatch, paged_attention
from loramux_kernels.rotary import RotaryLayer, rotate_and_store_reference

_MOST_SPLITS = 16
_PROGRAMS = 256  # about two for each multiprocessor of a large GPU


def num_splits(num_rows: int, num_kv_heads: int) -> int:
    """Programs that share one context: as many as fill the GPU, a power of two."""
    splits = 1
    while splits < _MOST_SPLITS and splits * 2 * num_rows * num_kv_heads <= _PROGRAMS:
        splits *= 2
    return splits


@dataclass(frozen=True, slots=True)
class SplitCounters:
    """Arrival counts of the programs that share a context: they only grow, and are told apart modulo the splits.

    One array for each number of splits, so that a count never changes its modulus.
    """

    counts: dict[int, Tensor]

    @classmethod
    def make(cls, num_kv_heads: int, device: torch.device) -> SplitCounters:
        """For all step sizes of a model."""
        counts: dict[int, Tensor] = {}
        splits = _MOST_SPLITS
        while splits > 1:
            most_rows = _PROGRAMS // (splits * num_kv_heads) + 1
            counts[splits] = torch.zeros(most_rows * num_kv_heads, dtype=torch.int32, device=device)
            splits //= 2
        return cls(counts)


def decode_attention_reference(
    qkv: Tensor,
    positions: Tensor,
    layer: RotaryLayer,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
) -> Tensor:
    """In torch, in the shape of `decode_attention`."""
    queries = rotate_and_store_reference(qkv, positions, layer, key_cache, value_cache, batch.slot_mapping)
    attended = paged_attention(
        queries, key_cache, value_cache, batch, scale=layer.scale, sliding_window=layer.sliding_window
    )
    return attended.flatten(1)


def decode_attention(
    qkv: Tensor,
    positions: Tensor,
    layer: RotaryLayer,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
    counters: SplitCounters,
) -> Tensor:
    """One query token a sequence: row i is sequence i.

    Args:
        qkv: [pieces, rows, width] of any float dtype: the packed projections, pieces still to be added up.
        positions: int32 [rows].
        key_cache, value_cache: [blocks, kv_heads, block_size, head_dim], without this step's tokens.
        batch: `context_lens` count the new token.

    Returns:
        [rows, heads · head_dim] in the dtype of the cache.
    """
    from loramux_kernels import decode_attention_triton

    out = key_cache.new_empty(qkv.shape[1], layer.num_heads * layer.head_dim)
    decode_attention_triton.launch(qkv, positions, layer, key_cache, value_cache, batch, counters, out)
    return out
