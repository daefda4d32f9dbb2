"""Paged attention on a CPU, where calls cost more than numbers: lookups once a step, few and large calls a layer.

Sequences with about as many query tokens over about as long a context are a group, padded to one shape: those with one
query token are apart from the others. `paged_attention.py` has the formula.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from loramux_kernels.paged_attention import AttentionBatch

_SHORT_CONTEXT, _FEW_QUERIES = 64, 16  # up to here padding costs less than another group
_MANY_SCORES = 1 << 14  # of one head


class CacheRows:
    """Paged caches [blocks, kv_heads, block_size, head_dim] of one shape, seen as rows of `head_dim` numbers."""

    def __init__(self, cache: Tensor) -> None:
        _, self.num_kv_heads, self.block_size, self.head_dim = cache.shape

    def of(self, blocks: NDArray[np.int64], offsets: NDArray[np.int64]) -> NDArray[np.int64]:
        """The row of each head at places in blocks: two of [..., n] → [..., kv_heads, n]."""
        heads = np.arange(self.num_kv_heads)[:, None]
        return (blocks[..., None, :] * self.num_kv_heads + heads) * self.block_size + offsets[..., None, :]


@dataclass(slots=True)
class _Group:
    """Sequences with `num_queries` tokens each, which look at `length` places of the cache."""

    queries: Tensor  # int64 [sequences · num_queries], their rows in the batch
    positions: Tensor  # int64 [sequences, num_queries]
    cached: Tensor  # int64 [sequences · kv_heads · length], rows of the caches
    length: int
    is_batch: bool  # its queries are the rows of the batch, as they are
    masks: dict[int | None, Tensor] = field(default_factory=dict)

    def attend(self, query: Tensor, key_cache: Tensor, value_cache: Tensor, scale: float, window: int | None) -> Tensor:
        """query [rows, heads, head_dim] → [sequences · num_queries, heads · head_dim]."""
        (sequences, n), (_, heads, dim), kv_heads = self.positions.shape, query.shape, key_cache.shape[1]
        if not self.is_batch:
            query = query.index_select(0, self.queries)
        query = query.view(sequences, n, kv_heads, heads // kv_heads, dim)
        keys, values = (
            cache.view(-1, dim).index_select(0, self.cached).view(sequences, kv_heads, self.length, dim)
            for cache in (key_cache, value_cache)
        )
        if n * self.length > _MANY_SCORES:
            out = _attend_much(query, keys, values, self._mask(window, query.dtype), scale)
        else:
            out = _attend(query, keys, values, self._mask(window, query.dtype, query.shape[2:4]), scale)
        return out.reshape(sequences * n, -1)

    def _mask(self, window: int | None, dtype: torch.dtype, heads: Sequence[int] = ()) -> Tensor:
        """0 where a query looks, -inf elsewhere: [sequences, 1, num_queries, length].

        For (kv_heads, heads of each) at once: [sequences · kv_heads, num_queries · heads of each, length].
        """
        mask = self.masks.get(window)
        if mask is None:
            query, key = self.positions[:, None, :, None], torch.arange(self.length)
            hidden = key > query if window is None else (key > query) | (key <= query - window)
            mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
            if heads:
                mask = mask[:, :, :, None].expand(-1, heads[0], -1, heads[1], -1).flatten(2, 3).flatten(0, 1)
            self.masks[window] = mask
        return mask


def _attend(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """query [S, n, kv_heads, heads of each, D], keys and values [S, kv_heads, L, D], mask of these → as query."""
    _, n, kv_heads, shared, dim = query.shape
    q, k, v = query.transpose(1, 2).reshape(-1, n * shared, dim), keys.flatten(0, 1), values.flatten(0, 1)
    scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=scale)
    out = torch.bmm(scores.softmax(-1, dtype=torch.float32).to(v.dtype), v)
    return out.view(-1, kv_heads, n, shared, dim).transpose(1, 2)


def _attend_much(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The same with a mask of the sequences, and without the scores going through memory."""
    q = query.flatten(2, 3).transpose(1, 2)
    out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scale, enable_gqa=True)
    return out.transpose(1, 2)


class PaddedAttention:
    """The attention of one step, for every layer. All tensors are on the CPU, and every row is a sequence's."""

    def __init__(self, batch: AttentionBatch, caches: CacheRows) -> None:
        starts, contexts = batch.query_starts.numpy().astype(np.int64), batch.context_lens.numpy().astype(np.int64)
        lengths = np.diff(starts)
        kinds = _doublings(contexts, _SHORT_CONTEXT) + 64 * np.where(
            lengths > 1, 1 + _doublings(lengths, _FEW_QUERIES), 0
        )
        self._places = torch.empty(starts[-1], dtype=torch.int64)  # of each row among the groups' rows
        self._groups: list[_Group] = []
        num_places = 0
        for kind in np.unique(kinds[lengths > 0]):
            chosen = np.flatnonzero((kinds == kind) & (lengths > 0))
            group = _group(batch, caches, chosen, starts[chosen], lengths[chosen], contexts[chosen])
            self._groups.append(group)
            self._places[group.queries] = torch.arange(num_places, num_places + len(group.queries))
            num_places += len(group.queries)

    def __call__(
        self, query: Tensor, key_cache: Tensor, value_cache: Tensor, *, scale: float, sliding_window: int | None
    ) -> Tensor:
        """As `paged_attention`: query [rows, heads, head_dim] → [rows, heads · head_dim]."""
        attended = [g.attend(query, key_cache, value_cache, scale, sliding_window) for g in self._groups]
        if self._groups[0].is_batch:
            return attended[0]
        return torch.cat(attended).index_select(0, self._places)


def _group(
    batch: AttentionBatch,
    caches: CacheRows,
    sequences: NDArray[np.int64],
    starts: NDArray[np.int64],
    lengths: NDArray[np.int64],
    contexts: NDArray[np.int64],
) -> _Group:
    """Sequences padded to the longest: with their last token once more, and with what lies in some block."""
    token = np.minimum(np.arange(lengths.max()), lengths[:, None] - 1)  # [sequences, num_queries]
    place = np.arange(contexts.max())
    blocks = batch.block_tables.numpy()[batch.table_rows.numpy()[sequences]][:, place // caches.block_size]
    cached = caches.of(blocks.astype(np.int64), place % caches.block_size)
    queries = (starts[:, None] + token).reshape(-1)
    return _Group(
        torch.from_numpy(queries),
        positions=torch.from_numpy((contexts - lengths)[:, None] + token),
        cached=torch.from_numpy(cached.reshape(-1)),
        length=len(place),
        is_batch=len(queries) == lengths.sum() == batch.query_starts[-1],
    )


def _doublings(sizes: NDArray[np.int64], least: int) -> NDArray[np.int64]:
    """How often `least` is to be doubled to take in each size."""
    return np.ceil(np.log2(np.maximum(sizes, least) / least)).astype(np.int64)
