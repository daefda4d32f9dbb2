"""Causal attention of a ragged batch over a paged KV cache.

    out[i] = softmax(cap(scale · q[i] · Kᵀ) + mask) · V

over the keys and values of the sequence that token i belongs to, up to and with its own position. `cap(s)` is
`softcap · tanh(s / softcap)` (Gemma 2) or nothing; a sliding window of w leaves only the last w positions. Paging:
Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention", SOSP 2023.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Which tokens of a packed batch belong to which sequence, and where their keys and values lie.

    A sequence's tokens are consecutive rows; its query tokens are the last ones of its context.
    """

    query_lens: tuple[int, ...]  # tokens of each sequence in this step
    context_lens: tuple[int, ...]  # its tokens up to and with this step
    block_tables: Tensor  # int64 [sequences, most blocks], padded with any valid block
    slot_mapping: Tensor  # int64 [tokens]

    @property
    def num_tokens(self) -> int:
        """Rows of the packed batch."""
        return sum(self.query_lens)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention of every token over its own sequence's cached keys and values.

    Args:
        query: [tokens, heads, head_dim], positions already applied.
        key_cache, value_cache: [blocks, kv_heads, block_size, head_dim], this step's tokens already stored.
        batch: the ragged layout of `query`.
        scale: factor on the scores.
        sliding_window: how many positions back a token sees, its own included.
        softcap: bound of the scores before the mask.

    Returns:
        [tokens, heads, head_dim] in the dtype of `query`.
    """
    out = torch.empty_like(query)
    decodes: list[int] = []  # sequences with one query token share one padded call
    rows: list[int] = []
    start = 0
    for i, (length, context) in enumerate(zip(batch.query_lens, batch.context_lens, strict=True)):
        if length == 1:
            decodes.append(i)
            rows.append(start)
        else:
            end = start + length
            keys, values = _gather(key_cache, value_cache, batch.block_tables[i : i + 1], context)
            mask = _mask([context - length], length, context, sliding_window, query.device)
            out[start:end] = _attend(query[start:end][None], keys, values, mask, scale, softcap)[0]
        start += length
    if decodes:
        contexts = [batch.context_lens[i] for i in decodes]
        tables = batch.block_tables if len(decodes) == len(batch.query_lens) else batch.block_tables[decodes]
        keys, values = _gather(key_cache, value_cache, tables, max(contexts))
        mask = _mask([c - 1 for c in contexts], 1, max(contexts), sliding_window, query.device)
        one_each = query if len(rows) == query.shape[0] else query[rows]
        attended = _attend(one_each[:, None], keys, values, mask, scale, softcap)[:, 0]
        if one_each is query:
            return attended
        out[rows] = attended
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
