"""Attention of a decode step in Triton: a program a sequence, key-value head and split of the context."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from loramux_kernels.backend import pdl
from loramux_kernels.decode_attention import SplitCounters, num_splits
from loramux_kernels.paged_attention import AttentionBatch
from loramux_kernels.rotary import RotaryLayer
from loramux_kernels.rotary_triton import constants, gains, rotated_heads

_NEVER = tl.constexpr(-1e30)
_BLOCK_N = 64  # positions of the context at a time


@triton.jit
def _combined(sums, outs, ROWS: tl.constexpr, HALF: tl.constexpr, SPLITS: tl.constexpr):
    """Halves of the output [ROWS, HALF] from the partial softmaxes of all splits."""
    m = tl.full((ROWS,), _NEVER, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc1, acc2 = tl.zeros((ROWS, HALF), tl.float32), tl.zeros((ROWS, HALF), tl.float32)
    for split in tl.static_range(SPLITS):
        their_m = tl.load(sums + split * 2 * ROWS, cache_modifier=".cg")
        their_total = tl.load(sums + split * 2 * ROWS + ROWS, cache_modifier=".cg")
        larger = tl.maximum(m, their_m)
        decay, share = tl.exp2(m - larger), tl.exp2(their_m - larger)
        total = total * decay + their_total * share
        theirs = outs + split * 2 * ROWS * HALF
        acc1 = acc1 * decay[:, None] + tl.load(theirs, cache_modifier=".cg") * share[:, None]
        acc2 = acc2 * decay[:, None] + tl.load(theirs + HALF, cache_modifier=".cg") * share[:, None]
        m = larger
    return acc1 / total[:, None], acc2 / total[:, None]


@triton.jit(do_not_specialize=["T"])
def _decode_attention(
    qkv, positions, cos, sin, query_gain, key_gain, key_cache, value_cache, slot_mapping, tables, table_rows, out,
    partial_sums, partial_out, counters, T,
    NH: tl.constexpr, NKV: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, TABLE_WIDTH: tl.constexpr, PIECES: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    SCALE: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    head, t, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if PDL:
        gdc_launch_dependents()
    n = tl.load(positions + t)  # tokens in the cache; the new one's position
    slot = tl.load(slot_mapping + t).to(tl.int64)
    table = tables + tl.load(table_rows + t).to(tl.int64) * TABLE_WIDTH
    if PDL:
        gdc_wait()
    G: tl.constexpr = NH // NKV
    H2: tl.constexpr = D // 2
    rows, d = tl.arange(0, ROWS), tl.arange(0, HALF)
    inside = d < H2
    dtype = key_cache.dtype.element_ty
    qa, qb, ka, kb, va, vb = rotated_heads(
        qkv, cos, sin, query_gain, key_gain, t, head, n, T, rows, NH, NKV, D, HALF, PIECES, NORM, EPS
    )
    qa, qb, ka, kb = qa.to(dtype), qb.to(dtype), ka.to(dtype), kb.to(dtype)
    va, vb = va.to(dtype), vb.to(dtype)
    if split == 0:
        at = ((slot // BLOCK_SIZE * NKV + head) * BLOCK_SIZE + slot % BLOCK_SIZE) * D + d
        tl.store(key_cache + at, ka, mask=inside)
        tl.store(key_cache + at + H2, kb, mask=inside)
        tl.store(value_cache + at, va, mask=inside)
        tl.store(value_cache + at + H2, vb, mask=inside)
    # the new token opens the softmax
    factor: tl.constexpr = SCALE * 1.4426950408889634
    m = tl.sum(qa.to(tl.float32) * ka.to(tl.float32)[None, :], 1)
    m = (m + tl.sum(qb.to(tl.float32) * kb.to(tl.float32)[None, :], 1)) * factor
    total = tl.full((ROWS,), 1.0, tl.float32)
    acc1 = tl.zeros((ROWS, HALF), tl.float32) + va.to(tl.float32)[None, :]
    acc2 = tl.zeros((ROWS, HALF), tl.float32) + vb.to(tl.float32)[None, :]
    first = 0
    if WINDOW > 0:
        first = tl.maximum(0, n - WINDOW + 1)
    low, high = first, n
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(n - first, SPLITS), BLOCK_SIZE) * BLOCK_SIZE
        low = first + split * share
        high = tl.minimum(n, low + share)
        if split > 0:
            m = tl.full((ROWS,), _NEVER, tl.float32)
            total = tl.zeros((ROWS,), tl.float32)
            acc1, acc2 = tl.zeros((ROWS, HALF), tl.float32), tl.zeros((ROWS, HALF), tl.float32)
    offsets = tl.arange(0, BLOCK_N)
    for i in tl.range(low, high, BLOCK_N, num_stages=2):
        position = i + offsets
        known = position < high
        block = tl.load(table + position // BLOCK_SIZE, mask=known, other=0).to(tl.int64)
        at = ((block * NKV + head) * BLOCK_SIZE + position % BLOCK_SIZE)[:, None] * D + d[None, :]
        seen = known[:, None] & inside[None, :]
        k1 = tl.load(key_cache + at, mask=seen, other=0.0)
        k2 = tl.load(key_cache + at + H2, mask=seen, other=0.0)
        v1 = tl.load(value_cache + at, mask=seen, other=0.0)
        v2 = tl.load(value_cache + at + H2, mask=seen, other=0.0)
        scores = tl.dot(qa, tl.trans(k1), input_precision=PRECISION)
        scores = tl.dot(qb, tl.trans(k2), scores, input_precision=PRECISION)
        scores = tl.where(known[None, :], scores * factor, float("-inf"))
        larger = tl.maximum(m, tl.max(scores, 1))
        weights, decay = tl.exp2(scores - larger[:, None]), tl.exp2(m - larger)
        total = total * decay + tl.sum(weights, 1)
        acc1 = tl.dot(weights.to(dtype), v1, acc1 * decay[:, None], input_precision=PRECISION)
        acc2 = tl.dot(weights.to(dtype), v2, acc2 * decay[:, None], input_precision=PRECISION)
        m = larger
    o = out + (t.to(tl.int64) * NH + head * G + rows)[:, None] * D + d[None, :]
    mine = (rows < G)[:, None] & inside[None, :]
    if SPLITS == 1:
        tl.store(o, (acc1 / total[:, None]).to(dtype), mask=mine)
        tl.store(o + H2, (acc2 / total[:, None]).to(dtype), mask=mine)
    else:
        base = (t * NKV + head) * SPLITS
        cell = rows[:, None] * (2 * HALF) + d[None, :]
        tl.store(partial_sums + (base + split) * 2 * ROWS + rows, m)
        tl.store(partial_sums + (base + split) * 2 * ROWS + ROWS + rows, total)
        tl.store(partial_out + (base + split) * 2 * ROWS * HALF + cell, acc1)
        tl.store(partial_out + (base + split) * 2 * ROWS * HALF + HALF + cell, acc2)
        tl.debug_barrier()
        arrived = tl.atomic_add(counters + t * NKV + head, 1, sem="acq_rel")
        # not %: the count is signed, and goes on below zero after 2³¹
        if (arrived & (SPLITS - 1)) == SPLITS - 1:
            sums = partial_sums + base * 2 * ROWS + rows
            a, b = _combined(sums, partial_out + base * 2 * ROWS * HALF + cell, ROWS, HALF, SPLITS)
            tl.store(o, a.to(dtype), mask=mine)
            tl.store(o + H2, b.to(dtype), mask=mine)


def launch(
    qkv: Tensor,
    positions: Tensor,
    layer: RotaryLayer,
    key_cache: Tensor,
    value_cache: Tensor,
    batch: AttentionBatch,
    counters: SplitCounters,
    out: Tensor,
) -> None:
    """Write `out` [rows, heads · head_dim] and the caches."""
    use_pdl = pdl(out.device)
    num_rows = out.shape[0]
    splits = num_splits(num_rows, layer.num_kv_heads)
    fixed = constants(layer)
    query_rows = max(16, triton.next_power_of_2(layer.num_heads // layer.num_kv_heads))  # tl.dot takes 16 at least
    partials = num_rows * layer.num_kv_heads * splits if splits > 1 else 0
    sums = torch.empty(partials, 2, query_rows, dtype=torch.float32, device=out.device)
    outs = torch.empty(partials, query_rows, 2 * int(fixed["HALF"]), dtype=torch.float32, device=out.device)
    _decode_attention[(layer.num_kv_heads, num_rows, splits)](
        qkv,
        positions,
        layer.cos,
        layer.sin,
        *gains(layer),
        key_cache,
        value_cache,
        batch.slot_mapping,
        batch.block_tables,
        batch.table_rows,
        out,
        sums,
        outs,
        counters.counts.get(splits, sums),
        num_rows,
        **fixed,
        ROWS=query_rows,
        BLOCK_SIZE=key_cache.shape[2],
        TABLE_WIDTH=batch.block_tables.shape[1],
        PIECES=qkv.shape[0],
        SCALE=layer.scale,
        WINDOW=layer.sliding_window or 0,
        SPLITS=splits,
        BLOCK_N=_BLOCK_N,
        PRECISION="ieee" if out.element_size() == 4 else "tf32",
        PDL=use_pdl,
        num_warps=4,
        launch_pdl=use_pdl,
    )
