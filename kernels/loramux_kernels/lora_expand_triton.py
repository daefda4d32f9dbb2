"""The second half of LoRA in Triton: delta[t] = Bᵀ · h[t], which adds up the partial sums of the shrink.

See `lora_shrink_triton.py` for the division of the work, and for what is read before the wait. An adapter of a large
rank is many times the bytes of the others: its rows are units in parts, each a share of the columns over all ranks, so
that no program reads much more than any other.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from loramux_kernels.backend import pdl
from loramux_kernels.lora import PARTS, RANK_PAGE, WHOLE, LoraRows, LoraSite, LoraWeights
from loramux_kernels.lora_shrink_triton import adapter_tile, first_unit, precision, program_rows, units

_R = tl.constexpr(RANK_PAGE)
_WHOLE = tl.constexpr(WHOLE)
_TALL, _TALLER = tl.constexpr(32), tl.constexpr(128)  # ranks at a time where the columns are few


@triton.jit
def _slice(block, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, BN: tl.constexpr):
    """Which sibling a block of the output belongs to, its first column there, the width, the first column of all."""
    C0: tl.constexpr = (W0 + BN - 1) // BN
    C1: tl.constexpr = (W1 + BN - 1) // BN
    s = (block >= C0).to(tl.int32) + (block >= C0 + C1).to(tl.int32)
    block = block - tl.where(s > 0, C0, 0) - tl.where(s > 1, C1, 0)
    width = tl.where(s == 0, W0, tl.where(s == 1, W1, W2))
    return s, block * BN, width, tl.where(s > 0, W0, 0) + tl.where(s > 1, W1, 0)


@triton.jit
def _hidden(h, T, limit, R: tl.constexpr, PIECES: tl.constexpr, ALL_PIECES: tl.constexpr, STRIDE: tl.constexpr):
    """The sum [R] of a row's partial sums at `h`, 0 from `limit` on."""
    piece, r = tl.arange(0, ALL_PIECES), tl.arange(0, R)
    at = h + piece[:, None].to(tl.int64) * (T * STRIDE) + r[None, :]
    return tl.sum(tl.load(at, mask=(piece[:, None] < PIECES) & (r[None, :] < limit), other=0.0), 0)


@triton.jit
def hidden_rows(h, known, T, PIECES: tl.constexpr, STRIDE: tl.constexpr):
    """The sums [rows, ranks] of the partial sums at `h`."""
    hidden = tl.load(h, mask=known, other=0.0)
    for piece in tl.static_range(1, PIECES):
        hidden += tl.load(h + (piece * T).to(tl.int64) * STRIDE, mask=known, other=0.0)
    return hidden


@triton.jit
def _put(o, y, inside, rank, ADD: tl.constexpr):
    """Store `y`, or add it to what is there."""
    if ADD:
        if rank > 0:
            y += tl.load(o, mask=inside, other=0.0).to(tl.float32)
            tl.store(o, y.to(o.dtype.element_ty), mask=inside)
    else:
        tl.store(o, y.to(o.dtype.element_ty), mask=inside)


@triton.jit
def _expand_whole(
    b, tile, rank, n, width, h, o, T,
    PIECES: tl.constexpr, ALL_PIECES: tl.constexpr, STRIDE: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """A row's delta over a block of columns, its first page of ranks loaded."""
    r = tl.arange(0, _R)
    # straight line for the first page: in a loop its float32 copy would be hoisted, and spill
    hidden = _hidden(h, T, rank, _R, PIECES, ALL_PIECES, STRIDE)
    y = tl.sum(tile.to(tl.float32) * hidden[:, None], 0)
    for page in range(_R, rank, _R):
        inside = (r[:, None] < rank - page) & (n[None, :] < width)
        more = tl.load(b + (page + r[:, None]) * width + n[None, :], mask=inside, other=0.0)
        hidden = _hidden(h + page, T, rank - page, _R, PIECES, ALL_PIECES, STRIDE)
        y += tl.sum(more.to(tl.float32) * hidden[:, None], 0)
    _put(o + n, y, n < width, rank, ADD)


@triton.jit
def _expand_part(
    b, rank, part, first, width, h, o, T,
    BN: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr, ALL_PIECES: tl.constexpr, STRIDE: tl.constexpr,
    ADD: tl.constexpr,
):  # fmt: skip
    """A row's delta over one part of a block's columns."""
    r, c = tl.arange(0, _TALLER), part * COLUMNS + tl.arange(0, COLUMNS)
    n, mine = first + c, c < BN
    y = tl.zeros((COLUMNS,), tl.float32)
    for page in range(0, rank, _TALLER):
        inside = (r[:, None] < rank - page) & (mine & (n < width))[None, :]
        tile = tl.load(b + (page + r[:, None]) * width + n[None, :], mask=inside, other=0.0)
        hidden = _hidden(h + page, T, rank - page, _TALLER, PIECES, ALL_PIECES, STRIDE)
        y += tl.sum(tile.to(tl.float32) * hidden[:, None], 0)
    _put(o + n, y, mine & (n < width), rank, ADD)


@triton.jit(do_not_specialize=["target", "T"])
def _expand_by_row(
    partials, elements, b_offsets, ranks, slots, units, num_units, out, target, T,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, PIECES: tl.constexpr, SLICES: tl.constexpr,
    NUM_TARGETS: tl.constexpr, RANKS: tl.constexpr, ADD: tl.constexpr, ALL_PIECES: tl.constexpr, BN: tl.constexpr,
    COLUMNS: tl.constexpr, DIVIDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    u = tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
    if DIVIDED:
        count = tl.load(num_units)
        t, slot, part = first_unit(units, slots, u, T)
        if part < 0:
            return
    else:
        t, slot = u, tl.load(slots + u)
    s, first, width, column = _slice(tl.program_id(0), W0, W1, W2, BN)
    b, rank = adapter_tile(elements, b_offsets, ranks, slot, target + s, NUM_TARGETS)
    r, n = tl.arange(0, _R), first + tl.arange(0, BN)
    early = rank
    if DIVIDED:
        early = tl.where(part == _WHOLE, rank, 0)
    tile = tl.load(b + r[:, None] * width + n[None, :], mask=(r[:, None] < early) & (n[None, :] < width), other=0.0)
    if PDL:
        gdc_wait()
    STRIDE: tl.constexpr = SLICES * RANKS
    WIDTH: tl.constexpr = W0 + W1 + W2
    h, o = partials + (s * T + t).to(tl.int64) * RANKS, out + t.to(tl.int64) * WIDTH + column
    if DIVIDED:
        if part == _WHOLE:
            _expand_whole(b, tile, rank, n, width, h, o, T, PIECES, ALL_PIECES, STRIDE, ADD)
        else:
            _expand_part(b, rank, part, first, width, h, o, T, BN, COLUMNS, PIECES, ALL_PIECES, STRIDE, ADD)
        for more in range(u + tl.num_programs(1), count, tl.num_programs(1)):  # these are parts: rows come first
            unit = tl.load(units + more)
            t, part = unit // 32, unit % 32
            b, rank = adapter_tile(elements, b_offsets, ranks, tl.load(slots + t), target + s, NUM_TARGETS)
            h, o = partials + (s * T + t).to(tl.int64) * RANKS, out + t.to(tl.int64) * WIDTH + column
            _expand_part(b, rank, part, first, width, h, o, T, BN, COLUMNS, PIECES, ALL_PIECES, STRIDE, ADD)
    else:
        _expand_whole(b, tile, rank, n, width, h, o, T, PIECES, ALL_PIECES, STRIDE, ADD)


@triton.jit
def _segment_part(
    b, rank, part, first, width, h, o, m_in, T,
    BM: tl.constexpr, BN: tl.constexpr, COLUMNS: tl.constexpr, PIECES: tl.constexpr, STRIDE: tl.constexpr,
    ADD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A segment's delta over one part of a block's columns."""
    r, c = tl.arange(0, _TALL), part * COLUMNS + tl.arange(0, COLUMNS)
    mine = (c < BN) & (first + c < width)
    y = tl.zeros((BM, COLUMNS), tl.float32)
    for page in tl.range(0, rank, _TALL, num_stages=1):
        hidden = hidden_rows(h + page + r[None, :], m_in & (r[None, :] < rank - page), T, PIECES, STRIDE)
        inside = (r[:, None] < rank - page) & mine[None, :]
        tile = tl.load(b + (page + r[:, None]) * width + (first + c)[None, :], mask=inside, other=0.0)
        y = tl.dot(hidden.to(tile.dtype), tile, y, input_precision=PRECISION)
    _put(o + (first + c)[None, :], y, m_in & mine[None, :], rank, ADD)


@triton.jit(do_not_specialize=["target", "T", "G"])
def _expand_by_segment(
    partials, elements, b_offsets, ranks, segments, out, target, T, G,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, PIECES: tl.constexpr, SLICES: tl.constexpr,
    NUM_TARGETS: tl.constexpr, RANKS: tl.constexpr, ADD: tl.constexpr, BN: tl.constexpr, COLUMNS: tl.constexpr,
    BM: tl.constexpr, DIVIDED: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
    start, end = tl.load(segments + g), tl.load(segments + G + g)
    if start >= end:
        return
    s, first, width, column = _slice(tl.program_id(0), W0, W1, W2, BN)
    b, rank = adapter_tile(elements, b_offsets, ranks, tl.load(segments + 2 * G + g), target + s, NUM_TARGETS)
    r, n, m = tl.arange(0, _R), first + tl.arange(0, BN), start + tl.arange(0, BM)
    STRIDE: tl.constexpr = SLICES * RANKS
    m_in = m[:, None] < end
    h = partials + (s * T + m[:, None]).to(tl.int64) * RANKS
    o = out + m[:, None].to(tl.int64) * (W0 + W1 + W2) + column
    if DIVIDED:
        part = tl.load(segments + 3 * G + g)
        if part != _WHOLE:
            if PDL:
                gdc_wait()
            _segment_part(b, rank, part, first, width, h, o, m_in, T, BM, BN, COLUMNS, PIECES, STRIDE, ADD, PRECISION)
            return
    tile = tl.load(b + r[:, None] * width + n[None, :], mask=(r[:, None] < rank) & (n[None, :] < width), other=0.0)
    if PDL:
        gdc_wait()
    y = tl.zeros((BM, BN), tl.float32)
    for page in range(0, rank, _R):
        hidden = hidden_rows(h + page + r[None, :], m_in & (r[None, :] < rank - page), T, PIECES, STRIDE)
        y = tl.dot(hidden.to(tile.dtype), tile, y, input_precision=PRECISION)
        ahead = page + _R
        more = (r[:, None] < rank - ahead) & (n[None, :] < width)
        tile = tl.load(b + (ahead + r[:, None]) * width + n[None, :], mask=more, other=0.0)
    _put(o + n[None, :], y, m_in & (n[None, :] < width), rank, ADD)


def expand(partials: Tensor, weights: LoraWeights, rows: LoraRows, site: LoraSite, out: Tensor, *, add: bool) -> None:
    """out [rows, sum of widths] = delta, or += delta; every row is written unless `add`."""
    use_pdl = pdl(out.device)
    first, second, third = (*site.widths, 0, 0)[:3]
    many = rows.segments is not None and rows.most_in_segment > 16
    most = 1024 if rows.segments is None else 256 if many else 512
    block = max(16, min(most, triton.next_power_of_2(max(site.widths))))
    constants = {
        "W0": first,
        "W1": second,
        "W2": third,
        "PIECES": partials.shape[0],
        "SLICES": len(site.widths),
        "NUM_TARGETS": weights.num_targets,
        "RANKS": partials.shape[-1],
        "ADD": add,
        "BN": block,
        "COLUMNS": max(16, block // PARTS),
        "DIVIDED": rows.divided,
        "PDL": use_pdl,
        "launch_pdl": use_pdl,
    }
    blocks = sum(-(-width // block) for width in site.widths)
    shared = (partials, weights.elements, weights.b_offsets, weights.ranks)
    num_rows = out.shape[0]
    if rows.segments is None:
        pieces = triton.next_power_of_2(partials.shape[0])
        _expand_by_row[(blocks, program_rows(rows))](
            *shared, *units(rows), out, site.target, num_rows, ALL_PIECES=pieces, **constants, num_warps=4
        )
        return
    num_segments = rows.segments.shape[1]
    _expand_by_segment[(blocks, num_segments)](
        *shared,
        rows.segments,
        out,
        site.target,
        num_rows,
        num_segments,
        BM=rows.most_in_segment,
        PRECISION=precision(out),
        **constants,
        num_warps=8 if many else 4,
    )
