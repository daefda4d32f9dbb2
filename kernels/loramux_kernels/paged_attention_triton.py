"""The Triton kernels of `paged_attention`: one for prefill, chunks, mixed batches and decode, one that joins splits.

A program takes a tile of query rows, some tokens of one sequence times the query heads that share one KV head, and
walks over the context with the online softmax of Dao, "FlashAttention-2", ICLR 2024. When decoding leaves too few
programs to fill a GPU, several share a context and `_join_splits` adds up
their parts (Dao et al., "Flash-Decoding", 2023).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from loramux_kernels.backend import pdl, shared_memory
from loramux_kernels.paged_attention import AttentionBatch

_LOG2_E = tl.constexpr(1.4426950408889634)
_NEVER = tl.constexpr(float("-inf"))

# they change from step to step: a new value must not compile anything
_METADATA = ["query_starts", "context_lens", "block_tables", "table_rows"]
_STEP_ARGUMENTS = ["sequences", "table_stride", "query_token", "query_head"]


@triton.jit
def _sequence_of(tile, query_starts, sequences, TOKENS: tl.constexpr):
    """The sequence that `tile` belongs to, when sequence s has its first tile at query_starts[s] // TOKENS + s.

    That leaves every sequence enough tiles without a list made by the host; some hold nothing. Found by bisection.
    """
    low = tile * 0
    high = low + sequences
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(query_starts + middle) // TOKENS + middle <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def _mask(rows, dims, D: tl.constexpr, D_PADDED: tl.constexpr):
    """rows [R, 1], dims [1, D_PADDED]; without padding nothing varies along the contiguous axis: loads stay wide."""
    return rows if D == D_PADDED else rows & (dims < D)


@triton.jit
def _scores(query, keys, scale, SOFTCAP: tl.constexpr, PRECISION: tl.constexpr):
    """query [R, D], keys [N, D] → float32 [R, N] in units of log2, capped but not masked."""
    scores = tl.dot(query, tl.trans(keys), input_precision=PRECISION)
    if SOFTCAP > 0:
        # tanh(x) = 1 - 2 / (exp(2x) + 1), which stays right when the exponential runs over
        power = tl.exp2(scores * (scale * (2 * _LOG2_E / SOFTCAP)))
        scores = (1 - 2 / (power + 1)) * (SOFTCAP * _LOG2_E)
    else:
        scores = scores * (scale * _LOG2_E)
    return scores


@triton.jit(do_not_specialize=_STEP_ARGUMENTS, do_not_specialize_on_alignment=_METADATA)
def _paged_attention(
    query, key_cache, value_cache, out, parts, part_sums, query_starts, context_lens, block_tables, table_rows,
    sequences, table_stride, query_token, query_head, scale,
    UNIT: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    CACHE_BLOCK: tl.constexpr, CACHE_HEAD: tl.constexpr, CACHE_ROW: tl.constexpr, OUT_TOKEN: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr,
    ONE_TOKEN_EACH: tl.constexpr, SPLITS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if ONE_TOKEN_EACH:
        sequence = tile
        start = tl.load(query_starts + sequence)
        first = start * 0
    else:
        tile = tl.num_programs(0) - 1 - tile  # the late tokens of a prompt have the most to do: they go first
        sequence = _sequence_of(tile, query_starts, sequences, TOKENS)
        start = tl.load(query_starts + sequence)
        first = (tile - start // TOKENS - sequence) * TOKENS
    length = tl.load(query_starts + sequence + 1) - start
    context = tl.load(context_lens + sequence)
    table = block_tables + tl.load(table_rows + sequence).to(tl.int64) * table_stride
    # before any return: were all programs to leave early, who waits for this kernel would wait for no other
    if PDL:
        gdc_wait()
    if first >= length:
        return

    rows = tl.arange(0, ROWS)
    tokens = first + rows // GROUP
    heads = kv_head * GROUP + rows % GROUP
    dims = tl.arange(0, D_PADDED)[None, :]
    row_mask = (rows < TOKENS * GROUP) & (tokens < length)
    mask = _mask(row_mask[:, None], dims, D, D_PADDED)
    # strides come in units of UNIT, so that the compiler knows them divisible and uses wide loads
    offsets = ((start + tokens).to(tl.int64) * query_token + heads * query_head) * UNIT
    q = tl.load(query + offsets[:, None] + dims, mask=mask, other=0.0)

    positions = context - length + tokens
    begin = tile * 0
    if WINDOW > 0:
        begin = tl.maximum(context - length + first - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
    end = context - length + tl.minimum(first + TOKENS, length)
    if SPLITS > 1:
        share = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), SPLITS) * BLOCK_N
        begin += split * share
        end = tl.minimum(end, begin + share)

    largest = tl.full([ROWS], _NEVER, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D_PADDED], tl.float32)
    head_offsets = kv_head * CACHE_HEAD + dims
    for at in range(begin, end, BLOCK_N):
        seen = at + tl.arange(0, BLOCK_N)
        in_context = seen < end
        block = tl.load(table + seen // BLOCK_SIZE, mask=in_context, other=0).to(tl.int64)
        at_rows = (block * CACHE_BLOCK + seen % BLOCK_SIZE * CACHE_ROW)[:, None] + head_offsets
        # what lies beyond a context may be another's NaN, and 0 · NaN is NaN
        kv_mask = _mask(in_context[:, None], dims, D, D_PADDED)
        k = tl.load(key_cache + at_rows, mask=kv_mask, other=0.0)
        scores = _scores(q, k, scale, SOFTCAP, PRECISION)
        visible = in_context[None, :] & (seen[None, :] <= positions[:, None])
        if WINDOW > 0:
            visible = visible & (seen[None, :] > positions[:, None] - WINDOW)
        scores = tl.where(visible, scores, _NEVER)
        higher = tl.maximum(largest, tl.max(scores, 1))
        # a row may have nothing to see in this tile: -inf - -inf is NaN
        origin = tl.where(higher == _NEVER, 0.0, higher)
        p = tl.exp2(scores - origin[:, None])
        shrink = tl.exp2(largest - origin)
        total = total * shrink + tl.sum(p, 1)
        v = tl.load(value_cache + at_rows, mask=kv_mask, other=0.0)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        largest = higher

    total = tl.where(total == 0, 1.0, total)  # rows that hold nothing, splits without a share
    result = acc / total[:, None]
    if SPLITS > 1:
        row = (split * sequences + sequence).to(tl.int64) * (tl.num_programs(1) * GROUP) + heads
        tl.store(part_sums + row, largest + tl.log2(total), mask=row_mask)
        if begin < end:
            tl.store(parts + row[:, None] * D_PADDED + dims, result, mask=row_mask[:, None])
    else:
        offsets = (start + tokens).to(tl.int64) * OUT_TOKEN + heads * D
        tl.store(out + offsets[:, None] + dims, result.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["sequences"], do_not_specialize_on_alignment=["query_starts"])
def _join_splits(
    parts, part_sums, out, query_starts, sequences,
    D: tl.constexpr, D_PADDED: tl.constexpr, OUT_TOKEN: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out = Σ w · part / Σ w with w = 2^sum, over the splits of one head of one sequence."""
    if PDL:
        gdc_launch_dependents()
    sequence = tl.program_id(0)
    head = tl.program_id(1)
    start = tl.load(query_starts + sequence)
    end = tl.load(query_starts + sequence + 1)
    if PDL:
        gdc_wait()
    if start == end:
        return
    splits = tl.arange(0, SPLITS)
    dims = tl.arange(0, D_PADDED)
    rows = (splits * sequences + sequence).to(tl.int64) * tl.num_programs(1) + head
    sums = tl.load(part_sums + rows)
    weights = tl.exp2(sums - tl.max(sums, 0))
    # a split without a share of the context wrote its sum, -inf, and nothing else
    part = tl.load(parts + rows[:, None] * D_PADDED + dims[None, :], mask=(sums > _NEVER)[:, None], other=0.0)
    result = tl.sum(part * weights[:, None], 0) / tl.sum(weights, 0)
    at = out + start.to(tl.int64) * OUT_TOKEN + head * D + dims
    if D == D_PADDED:
        tl.store(at, result.to(out.dtype.element_ty))
    else:
        tl.store(at, result.to(out.dtype.element_ty), mask=dims < D)


class Tile(NamedTuple):
    """How much a program takes: query rows, positions at a time, and what it runs with."""

    rows: int
    block_n: int
    num_warps: int
    num_stages: int


def choose_tile(group: int, head_dim: int, item_size: int, decode: bool, memory: int) -> Tile:
    """The tile for a model's shape, from static numbers only.

    Args:
        group: query heads of one KV head.
        head_dim: padded to a power of two.
        item_size: bytes of an element.
        decode: every sequence has one token at most: as few rows as there is work for.
        memory: bytes of shared memory that a program may use.
    """
    wide = head_dim * item_size > 256
    least = max(16, triton.next_power_of_2(group))
    if decode:
        rows, block_n, warps = least, 32 if wide else 64, 4
    elif item_size > 2:
        rows, block_n, warps = max(least, 32), 32, 4
    else:
        rows, block_n, warps = max(least, 64 if wide else 128), 32 if wide else 64, 4 if wide else 8
    for stages in (3, 2):
        if (rows + 2 * stages * block_n) * head_dim * item_size <= memory:
            return Tile(rows, block_n, warps, stages)
    return Tile(rows, block_n, warps, 1)


_ENOUGH_PROGRAMS = 264  # two for each multiprocessor of an H100
_MOST_SPLITS = 32


def choose_splits(sequences: int, kv_heads: int, tiles: int) -> int:
    """How many programs share one context of at most `tiles` tiles: a power of two, from static numbers only."""
    most = min(_ENOUGH_PROGRAMS // (sequences * kv_heads), tiles, _MOST_SPLITS)
    return 1 << (most.bit_length() - 1) if most > 0 else 1


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
    splits: int | None = None,
) -> Tensor:
    """Launch the kernels; arguments as of `loramux_kernels.paged_attention`.

    Args:
        splits: programs that share a context in a pure decode step; chosen when None.
    """
    num_tokens, heads, dim = query.shape
    _, kv_heads, block_size, _ = key_cache.shape
    sequences = batch.table_rows.shape[0]
    out = torch.empty(query.shape, dtype=query.dtype, device=query.device) if out is None else out
    _check_layout(query, key_cache, value_cache, batch, out)
    if num_tokens == 0 or sequences == 0:
        return out
    group, padded = heads // kv_heads, max(16, triton.next_power_of_2(dim))
    decode = batch.most_query_tokens == 1
    tile = choose_tile(group, padded, query.element_size(), decode, shared_memory(query.device))
    tokens = 1 if decode else tile.rows // group
    if not decode:
        splits = 1
    elif splits is None:
        reach = batch.block_tables.shape[1] * block_size
        reach = reach if sliding_window is None else min(reach, sliding_window + tile.block_n)
        splits = choose_splits(sequences, kv_heads, triton.cdiv(reach, tile.block_n))
    # the parts are out itself where there is nothing to join: the kernel does not touch them
    parts = part_sums = out
    if splits > 1:
        parts = torch.empty(splits, sequences, heads, padded, dtype=torch.float32, device=query.device)
        part_sums = torch.empty(splits, sequences, heads, dtype=torch.float32, device=query.device)
    unit = 8 if query.stride(0) % 8 == 0 == query.stride(1) % 8 else 1
    early = pdl(query.device)
    tiles = sequences if decode else num_tokens // tokens + sequences
    _paged_attention[(tiles, kv_heads, splits)](
        query, key_cache, value_cache, out, parts, part_sums,
        batch.query_starts, batch.context_lens, batch.block_tables, batch.table_rows,
        sequences, batch.block_tables.stride(0), query.stride(0) // unit, query.stride(1) // unit, float(scale),
        UNIT=unit, GROUP=group, D=dim, D_PADDED=padded, BLOCK_SIZE=block_size,
        CACHE_BLOCK=key_cache.stride(0), CACHE_HEAD=key_cache.stride(1), CACHE_ROW=key_cache.stride(2),
        OUT_TOKEN=out.stride(0), WINDOW=sliding_window or 0, SOFTCAP=softcap or 0.0,
        ROWS=tile.rows, TOKENS=tokens, BLOCK_N=tile.block_n, ONE_TOKEN_EACH=decode, SPLITS=splits,
        PRECISION="ieee", PDL=early, num_warps=tile.num_warps, num_stages=tile.num_stages, launch_pdl=early,
    )  # fmt: skip
    if splits > 1:
        _join_splits[(sequences, heads)](
            parts, part_sums, out, batch.query_starts, sequences,
            D=dim, D_PADDED=padded, OUT_TOKEN=out.stride(0), SPLITS=splits, PDL=early, num_warps=2, launch_pdl=early,
        )  # fmt: skip
    return out


def _check_layout(query: Tensor, key_cache: Tensor, value_cache: Tensor, batch: AttentionBatch, out: Tensor) -> None:
    assert query.shape[1] % key_cache.shape[1] == 0
    assert query.stride(2) == key_cache.stride(3) == out.stride(2) == batch.block_tables.stride(1) == 1
    assert key_cache.stride() == value_cache.stride()
    assert out.shape == query.shape
    assert out.stride(1) == out.shape[2]
    metadata = (batch.query_starts, batch.context_lens, batch.block_tables, batch.table_rows)
    assert all(t.dtype == torch.int32 for t in metadata)
