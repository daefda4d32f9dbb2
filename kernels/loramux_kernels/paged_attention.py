"""Causal attention of a ragged batch over a paged KV cache.

    out[i] = softmax(cap(scale · q[i] · Kᵀ) + mask) · V

over the keys and values of the sequence that token i belongs to, up to and with its own position. `cap(s)` is
`softcap · tanh(s / softcap)` (Gemma 2) or nothing; a sliding window of w leaves only the last w positions. Paging:
Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from loramux_kernels.backend import runs_triton


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Which tokens of a packed batch belong to which sequence, and where their keys and values lie.

    A sequence's tokens are consecutive rows; its query tokens are the last ones of its context. Tensors only, so that
    a CUDA graph can be replayed over them. For graphs a batch may be padded: sequences without a token at the end
    (their context and table are not looked at), and after them rows of no sequence, whose slot is a spare one and
    whose output means nothing.
    """

    query_starts: Tensor  # int32 [sequences + 1], the row of each sequence's first token; then the end of the last one
    context_lens: Tensor  # int32 [sequences], tokens up to and with this step
    block_tables: Tensor  # int32 [any rows, most blocks], padded with any valid block
    table_rows: Tensor  # int32 [sequences], the row of block_tables of each sequence
    slot_mapping: Tensor  # int32 [tokens]
    most_query_tokens: int  # no sequence has more tokens in this step; 1: a pure decode step


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of every token over its own sequence's cached keys and values.

    Args:
        query: [tokens, heads, head_dim], positions already applied; any strides, the last dimension contiguous.
        key_cache, value_cache: [blocks, kv_heads, block_size, head_dim], this step's tokens already stored.
        batch: the ragged layout of `query`.
        scale: factor on the scores.
        sliding_window: how many positions back a token sees, its own included.
        softcap: bound of the scores before the mask.
        out: where the result goes, like the result.

    Returns:
        [tokens, heads, head_dim] in the dtype of `query`.
    """
    options: dict[str, Any] = {"scale": scale, "sliding_window": sliding_window, "softcap": softcap, "out": out}
    if runs_triton(query):
        from loramux_kernels import paged_attention_triton

        return paged_attention_triton.paged_attention(query, key_cache, value_cache, batch, **options)
    return reference_paged_attention(query, key_cache, value_cache, batch, **options)


def reference_paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """`paged_attention` in torch: it defines the result. Rows of no sequence are 0."""
    tables = batch.block_tables[batch.table_rows]
    starts, contexts = batch.query_starts.tolist(), batch.context_lens.tolist()
    out = torch.empty_like(query) if out is None else out
    out[starts[-1] :] = 0
    decodes: list[int] = []  # sequences with one query token share one padded call
    for i, (start, end, context) in enumerate(zip(starts, starts[1:], contexts, strict=False)):
        if end - start == 1:
            decodes.append(i)
        elif end > start:
            keys, values = _gather(key_cache, value_cache, tables[i : i + 1], context)
            mask = _mask([context - (end - start)], end - start, context, sliding_window, query.device)
            out[start:end] = _attend(query[start:end][None], keys, values, mask, scale, softcap)[0]
    if decodes:
        rows = [starts[i] for i in decodes]
        contexts = [contexts[i] for i in decodes]
        tables = tables if len(decodes) == len(tables) else tables[decodes]
        keys, values = _gather(key_cache, value_cache, tables, max(contexts))
        mask = _mask([c - 1 for c in contexts], 1, max(contexts), sliding_window, query.device)
        out[rows] = _attend(query[rows][:, None], keys, values, mask, scale, softcap)[:, 0]
    return out


def _gather(key_cache: Tensor, value_cache: Tensor, tables: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Keys and values of some sequences as [sequences, kv_heads, length rounded up to blocks, head_dim]."""
    block_size = key_cache.shape[2]
    tables = tables[:, : -(-length // block_size)]

    def contiguous(cache: Tensor) -> Tensor:
        blocks = cache[tables]  # [sequences, blocks, kv_heads, block_size, head_dim]
        return blocks.transpose(1, 2).flatten(2, 3)

    return contiguous(key_cache), contiguous(value_cache)


def _mask(
    first_positions: list[int], num_queries: int, length: int, window: int | None, device: torch.device
) -> Tensor:
    """True where a query may look: bool [sequences, 1, queries, length rounded later by the caller's keys]."""
    first = torch.tensor(first_positions, device=device)[:, None, None, None]
    query = first + torch.arange(num_queries, device=device)[:, None]
    key = torch.arange(length, device=device)
    allowed = key <= query
    return allowed if window is None else allowed & (key > query - window)


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, softcap: float | None) -> Tensor:
    """query [S, n, heads, D], keys and values [S, kv_heads, ≥ L, D], mask [S, 1, n, L] → [S, n, heads, D]."""
    length = mask.shape[-1]
    keys, values = keys[:, :, :length], values[:, :, :length]
    q = query.transpose(1, 2)  # [S, heads, n, D]
    if softcap is None:
        grouped = keys.shape[1] != q.shape[1]
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale, enable_gqa=grouped)
        return out.transpose(1, 2)
    groups = q.shape[1] // keys.shape[1]
    q = q.unflatten(1, (keys.shape[1], groups))  # [S, kv_heads, groups, n, D]
    scores = (q @ keys[:, :, None].transpose(-1, -2)).float() * scale
    scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
    out = scores.softmax(-1).to(values.dtype) @ values[:, :, None]
    return out.flatten(1, 2).transpose(1, 2)
