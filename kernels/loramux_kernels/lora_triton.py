"""LoRA of a heterogeneous batch in Triton: shrink and expand, by token and by segment.

    h[t] = A · x[t]          shrink, float32 partial sums over pieces of the input: no zero fill, no atomics
    delta[t] = Bᵀ · h[t]     expand, which adds the partial sums up

with the A and Bᵀ of row t's adapter at its true rank, out of the pool that `LoraWeights` describes. Sibling projections
(q, k, v; gate, up) are slices of one launch. Where most rows have an adapter of their own, a program works on one row;
where an adapter has several rows, on a segment of them with a matrix product: two kernels, since one holding both
pays the registers of the larger. Chen et al., "Punica: Multi-Tenant LoRA Serving", MLSys 2024 (SGMV), without its
padding to one rank.

Weights are read before the wait for the kernel in front (programmatic dependent launch), since no kernel writes them.
The shrink lets the next kernel start only once its own wait is over: whoever starts behind it may take the input for
complete, and a GEMM that follows shrink and expand need not wait again before it has its weights on the way.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from loramux_kernels.backend import pdl
from loramux_kernels.gated_activation import Activation
from loramux_kernels.gated_activation_triton import activate
from loramux_kernels.lora import RANK_PAGE, LoraRows, LoraSite, LoraWeights, piece_length

_R = tl.constexpr(RANK_PAGE)  # ranks that a program works on at a time


@triton.jit
def _tile(base, offsets, ranks, slot, target, NUM_TARGETS: tl.constexpr):
    """Where the slot's tile of a target begins, and its rank; 0 for a row without an adapter."""
    at = slot * NUM_TARGETS + target
    rank = tl.load(ranks + at, mask=slot >= 0, other=0)
    offset = tl.load(offsets + at, mask=slot >= 0, other=0)
    return base + (offset // 8) * 8, rank  # tiles are aligned, and so is then seen to be the address


@triton.jit(do_not_specialize=["target", "T"])
def _shrink_tokens(
    x, elements, a_offsets, ranks, slots, partials, target, T,
    K: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr, NUM_TARGETS: tl.constexpr, RANKS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    piece, s, t = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    a, rank = _tile(elements, a_offsets, ranks, tl.load(slots + t), target + s, NUM_TARGETS)
    r = tl.arange(0, _R)
    k = piece * BK + tl.arange(0, BK)
    tile = tl.load(a + r[:, None] * K + k[None, :], mask=(r[:, None] < rank) & (k[None, :] < K), other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    if rank > 0:
        row = tl.load(x + t.to(tl.int64) * K + k, mask=k < K, other=0.0).to(tl.float32)
        h = partials + ((piece * SLICES + s) * T + t).to(tl.int64) * RANKS + r
        tl.store(h, tl.sum(tile.to(tl.float32) * row[None, :], 1))
        for page in range(_R, rank, _R):
            inside = (r[:, None] < rank - page) & (k[None, :] < K)
            more = tl.load(a + (page + r[:, None]) * K + k[None, :], mask=inside, other=0.0)
            tl.store(h + page, tl.sum(more.to(tl.float32) * row[None, :], 1))


@triton.jit(do_not_specialize=["target", "T", "G"])
def _shrink_segments(
    x, elements, a_offsets, ranks, segments, partials, target, T, G,
    K: tl.constexpr, PIECE: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, SLICES: tl.constexpr,
    NUM_TARGETS: tl.constexpr, RANKS: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    piece, s, g = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = tl.load(segments + g), tl.load(segments + G + g)
    if start >= end:  # unused: others wait, and the next kernel for them
        return
    a, rank = _tile(elements, a_offsets, ranks, tl.load(segments + 2 * G + g), target + s, NUM_TARGETS)
    r, m = tl.arange(0, _R), start + tl.arange(0, BM)
    k = piece * PIECE + tl.arange(0, BK)
    if PIECE == BK:  # the first tile is on its way before the wait
        tile = tl.load(a + r[:, None] * K + k[None, :], mask=(r[:, None] < rank) & (k[None, :] < K), other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    rows = x + m[:, None].to(tl.int64) * K
    h = partials + ((piece * SLICES + s) * T + m[:, None]).to(tl.int64) * RANKS + r[None, :]
    if PIECE == BK:
        if rank > 0:
            xs = tl.load(rows + k[None, :], mask=(m[:, None] < end) & (k[None, :] < K), other=0.0)
            for page in range(0, rank, _R):
                tl.store(h + page, tl.dot(xs, tl.trans(tile), input_precision=PRECISION), mask=m[:, None] < end)
                ahead = page + _R
                inside = (r[:, None] < rank - ahead) & (k[None, :] < K)
                tile = tl.load(a + (ahead + r[:, None]) * K + k[None, :], mask=inside, other=0.0)
    else:
        for page in range(0, rank, _R):
            acc = tl.zeros((BM, _R), tl.float32)
            for i in range(0, PIECE, BK):
                inside = (r[:, None] < rank - page) & (i + k[None, :] < K)
                at = tl.load(a + (page + r[:, None]) * K + i + k[None, :], mask=inside, other=0.0)
                xs = tl.load(rows + i + k[None, :], mask=(m[:, None] < end) & (i + k[None, :] < K), other=0.0)
                acc = tl.dot(xs, tl.trans(at), acc, input_precision=PRECISION)
            tl.store(h + page, acc, mask=m[:, None] < end)


@triton.jit
def _slice(block, W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, BN: tl.constexpr):
    """Which sibling a block of the output belongs to, the block's number in it, its width, its first column."""
    C0: tl.constexpr = (W0 + BN - 1) // BN
    C1: tl.constexpr = (W1 + BN - 1) // BN
    s = (block >= C0).to(tl.int32) + (block >= C0 + C1).to(tl.int32)
    block = block - tl.where(s > 0, C0, 0) - tl.where(s > 1, C1, 0)
    width = tl.where(s == 0, W0, tl.where(s == 1, W1, W2))
    return s, block, width, tl.where(s > 0, W0, 0) + tl.where(s > 1, W1, 0)


@triton.jit
def _hidden(h, T, limit, PIECES: tl.constexpr, ALL_PIECES: tl.constexpr, STRIDE: tl.constexpr):
    """The sum [ranks of a page] of a row's partial sums at `h`, 0 beyond `limit`."""
    piece, r = tl.arange(0, ALL_PIECES), tl.arange(0, _R)
    at = h + piece[:, None].to(tl.int64) * (T * STRIDE) + r[None, :]
    return tl.sum(tl.load(at, mask=(piece[:, None] < PIECES) & (r[None, :] < limit), other=0.0), 0)


@triton.jit
def _hidden_rows(h, known, T, PIECES: tl.constexpr, STRIDE: tl.constexpr):
    """The sums [rows, ranks of a page] of the partial sums at `h`."""
    hidden = tl.load(h, mask=known, other=0.0)
    for piece in tl.static_range(1, PIECES):
        hidden += tl.load(h + (piece * T).to(tl.int64) * STRIDE, mask=known, other=0.0)
    return hidden


@triton.jit(do_not_specialize=["target", "T"])
def _expand_tokens(
    partials, elements, b_offsets, ranks, slots, out, target, T,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, PIECES: tl.constexpr, SLICES: tl.constexpr,
    NUM_TARGETS: tl.constexpr, RANKS: tl.constexpr, ADD: tl.constexpr, ALL_PIECES: tl.constexpr, BN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    t = tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
    s, block, width, first = _slice(tl.program_id(0), W0, W1, W2, BN)
    b, rank = _tile(elements, b_offsets, ranks, tl.load(slots + t), target + s, NUM_TARGETS)
    r, n = tl.arange(0, _R), block * BN + tl.arange(0, BN)
    tile = tl.load(b + r[:, None] * width + n[None, :], mask=(r[:, None] < rank) & (n[None, :] < width), other=0.0)
    if PDL:
        gdc_wait()
    h = partials + (s * T + t).to(tl.int64) * RANKS
    # straight line for the first page: in a loop its float32 copy would be hoisted, and spill
    hidden = _hidden(h, T, rank, PIECES, ALL_PIECES, SLICES * RANKS)
    y = tl.sum(tile.to(tl.float32) * hidden[:, None], 0)
    for page in range(_R, rank, _R):
        inside = (r[:, None] < rank - page) & (n[None, :] < width)
        more = tl.load(b + (page + r[:, None]) * width + n[None, :], mask=inside, other=0.0)
        hidden = _hidden(h + page, T, rank - page, PIECES, ALL_PIECES, SLICES * RANKS)
        y += tl.sum(more.to(tl.float32) * hidden[:, None], 0)
    o = out + t.to(tl.int64) * (W0 + W1 + W2) + first + n
    if ADD:
        if rank > 0:
            y += tl.load(o, mask=n < width, other=0.0).to(tl.float32)
            tl.store(o, y.to(out.dtype.element_ty), mask=n < width)
    else:
        tl.store(o, y.to(out.dtype.element_ty), mask=n < width)


@triton.jit(do_not_specialize=["target", "T", "G"])
def _expand_segments(
    partials, elements, b_offsets, ranks, segments, out, target, T, G,
    W0: tl.constexpr, W1: tl.constexpr, W2: tl.constexpr, PIECES: tl.constexpr, SLICES: tl.constexpr,
    NUM_TARGETS: tl.constexpr, RANKS: tl.constexpr, ADD: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
    start, end = tl.load(segments + g), tl.load(segments + G + g)
    if start >= end:
        return
    s, block, width, first = _slice(tl.program_id(0), W0, W1, W2, BN)
    b, rank = _tile(elements, b_offsets, ranks, tl.load(segments + 2 * G + g), target + s, NUM_TARGETS)
    r, n, m = tl.arange(0, _R), block * BN + tl.arange(0, BN), start + tl.arange(0, BM)
    tile = tl.load(b + r[:, None] * width + n[None, :], mask=(r[:, None] < rank) & (n[None, :] < width), other=0.0)
    if PDL:
        gdc_wait()
    y = tl.zeros((BM, BN), tl.float32)
    h = partials + (s * T + m[:, None]).to(tl.int64) * RANKS + r[None, :]
    for page in range(0, rank, _R):
        hidden = _hidden_rows(h + page, (m[:, None] < end) & (r[None, :] < rank - page), T, PIECES, SLICES * RANKS)
        y = tl.dot(hidden.to(elements.dtype.element_ty), tile, y, input_precision=PRECISION)
        ahead = page + _R
        more = (r[:, None] < rank - ahead) & (n[None, :] < width)
        tile = tl.load(b + (ahead + r[:, None]) * width + n[None, :], mask=more, other=0.0)
    o = out + m[:, None].to(tl.int64) * (W0 + W1 + W2) + first + n[None, :]
    inside = (m[:, None] < end) & (n[None, :] < width)
    if ADD:
        if rank > 0:
            y += tl.load(o, mask=inside, other=0.0).to(tl.float32)
            tl.store(o, y.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(o, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["target", "T", "G"])
def _expand_gated(
    partials, elements, b_offsets, ranks, segments, gate_up, out, target, T, G,
    N: tl.constexpr, PIECES: tl.constexpr, NUM_TARGETS: tl.constexpr, RANKS: tl.constexpr, GATE: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
    start, end = tl.load(segments + g), tl.load(segments + G + g)
    if start >= end:
        return
    slot = tl.load(segments + 2 * G + g)
    gate_b, gate_rank = _tile(elements, b_offsets, ranks, slot, target, NUM_TARGETS)
    up_b, up_rank = _tile(elements, b_offsets, ranks, slot, target + 1, NUM_TARGETS)
    r, n, m = tl.arange(0, _R), tl.program_id(0) * BN + tl.arange(0, BN), start + tl.arange(0, BM)
    if PDL:
        gdc_wait()
    inside = (m[:, None] < end) & (n[None, :] < N)
    x = gate_up + m[:, None].to(tl.int64) * (2 * N) + n[None, :]
    gate = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + N, mask=inside, other=0.0).to(tl.float32)
    h = partials + m[:, None].to(tl.int64) * RANKS + r[None, :]
    for page in range(0, gate_rank, _R):
        hidden = _hidden_rows(h + page, (m[:, None] < end) & (r[None, :] < gate_rank - page), T, PIECES, 2 * RANKS)
        known = (r[:, None] < gate_rank - page) & (n[None, :] < N)
        tile = tl.load(gate_b + (page + r[:, None]) * N + n[None, :], mask=known, other=0.0)
        gate = tl.dot(hidden.to(tile.dtype), tile, gate, input_precision=PRECISION)
    h += T.to(tl.int64) * RANKS
    for page in range(0, up_rank, _R):
        hidden = _hidden_rows(h + page, (m[:, None] < end) & (r[None, :] < up_rank - page), T, PIECES, 2 * RANKS)
        known = (r[:, None] < up_rank - page) & (n[None, :] < N)
        tile = tl.load(up_b + (page + r[:, None]) * N + n[None, :], mask=known, other=0.0)
        up = tl.dot(hidden.to(tile.dtype), tile, up, input_precision=PRECISION)
    y = activate(gate.to(out.dtype.element_ty).to(tl.float32), GATE) * up
    tl.store(out + m[:, None].to(tl.int64) * N + n[None, :], y.to(out.dtype.element_ty), mask=inside)


def shrink(x: Tensor, weights: LoraWeights, rows: LoraRows, site: LoraSite, partials: Tensor) -> None:
    """Fill `partials` float32 [pieces, slices, rows, most ranks]; entries beyond an adapter's rank stay as they are."""
    num_rows, width = x.shape
    use_pdl = pdl(x.device)
    length = piece_length(width, rows.most_in_segment)
    shared = (x, weights.elements, weights.a_offsets, weights.ranks)
    constants = {"SLICES": len(site.widths), "NUM_TARGETS": weights.num_targets, "RANKS": partials.shape[-1]}
    launch = {"PDL": use_pdl, "num_warps": 4, "launch_pdl": use_pdl}
    grid = (partials.shape[0], len(site.widths))
    if rows.segments is None:
        _shrink_tokens[(*grid, num_rows)](
            *shared, rows.slots, partials, site.target, num_rows, K=width, BK=length, **constants, **launch
        )
        return
    num_segments = rows.segments.shape[1]
    _shrink_segments[(*grid, num_segments)](
        *shared,
        rows.segments,
        partials,
        site.target,
        num_rows,
        num_segments,
        K=width,
        PIECE=length,
        BK=length if rows.most_in_segment <= 16 else min(length, 128),
        BM=rows.most_in_segment,
        PRECISION=_precision(x),
        **constants,
        **launch,
    )


def expand(partials: Tensor, weights: LoraWeights, rows: LoraRows, site: LoraSite, out: Tensor, *, add: bool) -> None:
    """out [rows, sum of widths] = delta, or += delta; every row is written unless `add`."""
    use_pdl = pdl(out.device)
    first, second, third = (*site.widths, 0, 0)[:3]
    many = rows.segments is not None and rows.most_in_segment > 16
    block = min(256 if many else 512, triton.next_power_of_2(max(site.widths)))
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
        "PDL": use_pdl,
        "launch_pdl": use_pdl,
    }
    blocks = sum(-(-width // block) for width in site.widths)
    shared = (partials, weights.elements, weights.b_offsets, weights.ranks)
    num_rows = out.shape[0]
    if rows.segments is None:
        _expand_tokens[(blocks, num_rows)](
            *shared,
            rows.slots,
            out,
            site.target,
            num_rows,
            ALL_PIECES=triton.next_power_of_2(partials.shape[0]),
            **constants,
            num_warps=2,
        )
        return
    num_segments = rows.segments.shape[1]
    _expand_segments[(blocks, num_segments)](
        *shared,
        rows.segments,
        out,
        site.target,
        num_rows,
        num_segments,
        BM=rows.most_in_segment,
        PRECISION=_precision(out),
        **constants,
        num_warps=8 if many else 4,
    )


def expand_gated(
    partials: Tensor,
    weights: LoraWeights,
    rows: LoraRows,
    site: LoraSite,
    gate_up: Tensor,
    out: Tensor,
    activation: Activation,
) -> None:
    """out [rows, n] = act(gate + delta) ⊙ (up + delta), from gate_up [rows, 2n] and the shrink's partial sums."""
    assert rows.segments is not None, "rows that are many are in segments"
    use_pdl = pdl(out.device)
    num_rows, columns = out.shape
    num_segments = rows.segments.shape[1]
    _expand_gated[(triton.cdiv(columns, 128), num_segments)](
        partials,
        weights.elements,
        weights.b_offsets,
        weights.ranks,
        rows.segments,
        gate_up,
        out,
        site.target,
        num_rows,
        num_segments,
        N=columns,
        PIECES=partials.shape[0],
        NUM_TARGETS=weights.num_targets,
        RANKS=partials.shape[-1],
        GATE=int(activation),
        BN=128,
        BM=rows.most_in_segment,
        PRECISION=_precision(out),
        PDL=use_pdl,
        num_warps=8 if rows.most_in_segment > 16 else 4,
        launch_pdl=use_pdl,
    )


def _precision(tensor: Tensor) -> str:
    return "ieee" if tensor.element_size() == 4 else "tf32"
