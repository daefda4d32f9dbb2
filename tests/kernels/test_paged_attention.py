"""Paged attention against a naive loop over each query token."""

from __future__ import annotations

import math

import pytest
import torch

from loramux_kernels import AttentionBatch, paged_attention, store_kv


def naive(query, keys, values, *, first, scale, window=None, softcap=None):
    """query [n, H, D] at positions first…, keys and values [L, Hkv, D] → [n, H, D] in float64."""
    n, heads, _ = query.shape
    group = heads // keys.shape[1]
    out = torch.empty_like(query, dtype=torch.float64)
    for i in range(n):
        position = first + i
        lowest = 0 if window is None else max(0, position - window + 1)
        for h in range(heads):
            k, v = (
                keys[lowest : position + 1, h // group].double(),
                values[lowest : position + 1, h // group].double(),
            )
            scores = k @ query[i, h].double() * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[i, h] = scores.softmax(0) @ v
    return out


def paged(contexts, query_lens, *, heads, kv_heads, dim, block_size, dtype, seed=0):
    """Random sequences whose keys and values lie in shuffled blocks of a poisoned cache."""
    g = torch.Generator().manual_seed(seed)
    blocks_of = [-(-c // block_size) for c in contexts]
    total = sum(blocks_of) + 2
    order = torch.randperm(total, generator=g).tolist()
    key_cache = torch.full((total, kv_heads, block_size, dim), 1e4, dtype=dtype)
    value_cache = key_cache.clone()
    tables = torch.zeros(len(contexts), max(blocks_of), dtype=torch.int64)
    sequences, queries, slots = [], [], []
    for i, (context, n) in enumerate(zip(contexts, query_lens, strict=True)):
        table = [order.pop() for _ in range(blocks_of[i])]
        tables[i, : len(table)] = torch.tensor(table)
        where = torch.tensor([table[p // block_size] * block_size + p % block_size for p in range(context)])
        keys = torch.randn(context, kv_heads, dim, generator=g).to(dtype)
        values = torch.randn(context, kv_heads, dim, generator=g).to(dtype)
        store_kv(keys, values, key_cache, value_cache, where)
        queries.append(torch.randn(n, heads, dim, generator=g).to(dtype))
        slots.append(where[context - n :])
        sequences.append((keys, values))
    batch = AttentionBatch(tuple(query_lens), tuple(contexts), tables, torch.cat(slots))
    return torch.cat(queries), key_cache, value_cache, batch, sequences


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size"), [(4, 4, 8, 4), (6, 2, 24, 16), (5, 1, 64, 1)])
@pytest.mark.parametrize(
    ("contexts", "query_lens"),
    [([1], [1]), ([7, 33, 16], [1, 1, 1]), ([19], [19]), ([40, 3, 17, 17], [5, 3, 1, 17]), ([9, 9], [1, 8])],
)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (None, 3.0), (8, 2.0)])
def test_matches_the_naive_loop(
    dtype, tolerance, heads, kv_heads, dim, block_size, contexts, query_lens, window, softcap
):
    query, key_cache, value_cache, batch, sequences = paged(
        contexts, query_lens, heads=heads, kv_heads=kv_heads, dim=dim, block_size=block_size, dtype=dtype
    )
    scale = 1 / math.sqrt(dim)
    out = paged_attention(query, key_cache, value_cache, batch, scale=scale, sliding_window=window, softcap=softcap)
    assert out.shape == query.shape
    assert out.dtype == dtype
    start = 0
    for (keys, values), context, n in zip(sequences, contexts, query_lens, strict=True):
        expected = naive(
            query[start : start + n],
            keys,
            values,
            first=context - n,
            scale=scale,
            window=window,
            softcap=softcap,
        )
        error = (out[start : start + n].double() - expected).norm() / expected.norm()
        assert error < tolerance
        start += n


def test_store_kv_writes_only_its_slots():
    key_cache = torch.zeros(3, 2, 4, 8)
    value_cache = torch.zeros(3, 2, 4, 8)
    key, value = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    slots = torch.tensor([11, 0, 6])
    store_kv(key, value, key_cache, value_cache, slots)
    flat = key_cache.transpose(1, 2).reshape(12, 2, 8)
    assert torch.equal(flat[slots], key)
    assert torch.equal(value_cache.transpose(1, 2).reshape(12, 2, 8)[slots], value)
    untouched = [i for i in range(12) if i not in slots.tolist()]
    assert not flat[untouched].any()
