"""The first half of LoRA in Triton: h[t] = A · x[t], with the A of row t's adapter at its true rank.

Float32 partial sums over pieces of the input: no zero fill, no atomics. Sibling projections (q, k, v; gate, up) are
slices of one launch. Where most rows have an adapter of their own, a program works on one row; where an adapter has
several rows, on a segment of them with a matrix product: two kernels, since one holding both pays the registers of the
larger. Chen et al., "Punica: Multi-Tenant LoRA Serving", MLSys 2024 (SGMV), without its padding to one rank.

Weights are read before the wait for the kernel in front (programmatic dependent launch), since no kernel writes them.
The next kernel may start only once that wait is over: whoever starts behind the shrink may take the input for
complete, and a GEMM that follows shrink and expand need not wait again before it has its weights on the way.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from loramux_kernels.backend import pdl
from loramux_kernels.lora import PARTS, RANK_PAGE, WHOLE, LoraRows, LoraSite, LoraWeights, piece_length

_R = tl.constexpr(RANK_PAGE)  # ranks that a program works on at a time
_PARTS = tl.constexpr(PARTS)
_WHOLE = tl.constexpr(WHOLE)


@triton.jit
def adapter_tile(base, offsets, ranks, slot, target, NUM_TARGETS: tl.constexpr):
    """Where the slot's tile of a target begins, and its rank; 0 for a row without an adapter."""
    at = slot * NUM_TARGETS + target
    rank = tl.load(ranks + at, mask=slot >= 0, other=0)
    offset = tl.load(offsets + at, mask=slot >= 0, other=0)
    return base + (offset // 8) * 8, rank  # tiles are aligned, and so is then seen to be the address


@triton.jit
def first_unit(units, slots, u, T):
    """Row, slot and part of a program's first unit; a part below 0 where there is none for it."""
    unit = tl.load(units + u)
    t, slot = u, tl.load(slots + u, mask=u < T, other=0)  # a row's is at its place: no load waits for another
    if u >= T:
        t = tl.maximum(unit, 0) // 32
        slot = tl.load(slots + t)
    return t, slot, tl.where(unit < 0, -1, unit % 32)


@triton.jit
def _pages(part):
    """The first page of ranks of a part, and from each of its pages to the next, in ranks."""
    whole = part == _WHOLE
    return tl.where(whole, 0, part * _R), tl.where(whole, _R, _PARTS * _R)


@triton.jit
def _shrink_row(a, tile, rank, page, step, x, h, k, K: tl.constexpr):
    """One unit, its first tile loaded: store the partial sums of its pages."""
    r = tl.arange(0, _R)
    if rank > page:
        row = tl.load(x + k, mask=k < K, other=0.0).to(tl.float32)
        tl.store(h + page + r, tl.sum(tile.to(tl.float32) * row[None, :], 1))
        for later in range(page + step, rank, step):
            inside = (r[:, None] < rank - later) & (k[None, :] < K)
            more = tl.load(a + (later + r[:, None]) * K + k[None, :], mask=inside, other=0.0)
            tl.store(h + later + r, tl.sum(more.to(tl.float32) * row[None, :], 1))


@triton.jit(do_not_specialize=["target", "T"])
def _shrink_by_row(
    x, elements, a_offsets, ranks, slots, units, num_units, partials, target, T,
    K: tl.constexpr, BK: tl.constexpr, SLICES: tl.constexpr, NUM_TARGETS: tl.constexpr, RANKS: tl.constexpr,
    DIVIDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    piece, s, u = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    page, step = 0, _R
    if DIVIDED:
        count = tl.load(num_units)
        t, slot, part = first_unit(units, slots, u, T)
        if part < 0:  # unused: others wait, and the next kernel for them
            return
        page, step = _pages(part)
    else:
        t, slot = u, tl.load(slots + u)
    a, rank = adapter_tile(elements, a_offsets, ranks, slot, target + s, NUM_TARGETS)
    r, k = tl.arange(0, _R), piece * BK + tl.arange(0, BK)
    inside = (r[:, None] < rank - page) & (k[None, :] < K)
    tile = tl.load(a + (page + r[:, None]) * K + k[None, :], mask=inside, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    h = partials + ((piece * SLICES + s) * T).to(tl.int64) * RANKS
    _shrink_row(a, tile, rank, page, step, x + t.to(tl.int64) * K, h + t * RANKS, k, K)
    if DIVIDED:
        for more in range(u + tl.num_programs(2), count, tl.num_programs(2)):  # parts of large ranks
            unit = tl.load(units + more)
            t = unit // 32
            page, step = _pages(unit % 32)
            a, rank = adapter_tile(elements, a_offsets, ranks, tl.load(slots + t), target + s, NUM_TARGETS)
            inside = (r[:, None] < rank - page) & (k[None, :] < K)
            tile = tl.load(a + (page + r[:, None]) * K + k[None, :], mask=inside, other=0.0)
            _shrink_row(a, tile, rank, page, step, x + t.to(tl.int64) * K, h + t * RANKS, k, K)


@triton.jit(do_not_specialize=["target", "T", "G"])
def _shrink_by_segment(
    x, elements, a_offsets, ranks, segments, partials, target, T, G,
    K: tl.constexpr, PIECE: tl.constexpr, BK: tl.constexpr, BM: tl.constexpr, SLICES: tl.constexpr,
    NUM_TARGETS: tl.constexpr, RANKS: tl.constexpr, DIVIDED: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    piece, s, g = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    start, end = tl.load(segments + g), tl.load(segments + G + g)
    if start >= end:
        return
    a, rank = adapter_tile(elements, a_offsets, ranks, tl.load(segments + 2 * G + g), target + s, NUM_TARGETS)
    first, step = 0, _R
    if DIVIDED:
        first, step = _pages(tl.load(segments + 3 * G + g))
    r, m = tl.arange(0, _R), start + tl.arange(0, BM)
    k = piece * PIECE + tl.arange(0, BK)
    if PIECE == BK:  # the first tile is on its way before the wait
        inside = (r[:, None] < rank - first) & (k[None, :] < K)
        tile = tl.load(a + (first + r[:, None]) * K + k[None, :], mask=inside, other=0.0)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    rows = x + m[:, None].to(tl.int64) * K
    h = partials + ((piece * SLICES + s) * T + m[:, None]).to(tl.int64) * RANKS + r[None, :]
    if PIECE == BK:
        if rank > first:
            xs = tl.load(rows + k[None, :], mask=(m[:, None] < end) & (k[None, :] < K), other=0.0)
            for page in range(first, rank, step):
                tl.store(h + page, tl.dot(xs, tl.trans(tile), input_precision=PRECISION), mask=m[:, None] < end)
                ahead = page + step
                inside = (r[:, None] < rank - ahead) & (k[None, :] < K)
                tile = tl.load(a + (ahead + r[:, None]) * K + k[None, :], mask=inside, other=0.0)
    else:
        for page in range(first, rank, step):
            acc = tl.zeros((BM, _R), tl.float32)
            for i in range(0, PIECE, BK):
                inside = (r[:, None] < rank - page) & (i + k[None, :] < K)
                at = tl.load(a + (page + r[:, None]) * K + i + k[None, :], mask=inside, other=0.0)
                xs = tl.load(rows + i + k[None, :], mask=(m[:, None] < end) & (i + k[None, :] < K), other=0.0)
                acc = tl.dot(xs, tl.trans(at), acc, input_precision=PRECISION)
            tl.store(h + page, acc, mask=m[:, None] < end)


def shrink(x: Tensor, weights: LoraWeights, rows: LoraRows, site: LoraSite, partials: Tensor) -> None:
    """Fill `partials` float32 [pieces, slices, rows, most ranks]; entries beyond an adapter's rank stay as they are."""
    num_rows, width = x.shape
    use_pdl = pdl(x.device)
    length = piece_length(width, rows.most_in_segment)
    shared = (x, weights.elements, weights.a_offsets, weights.ranks)
    constants = {"SLICES": len(site.widths), "NUM_TARGETS": weights.num_targets, "RANKS": partials.shape[-1]}
    constants["DIVIDED"] = rows.divided
    launch = {"PDL": use_pdl, "num_warps": 4, "launch_pdl": use_pdl}
    grid = (partials.shape[0], len(site.widths))
    if rows.segments is None:
        _shrink_by_row[(*grid, program_rows(rows))](
            *shared, *units(rows), partials, site.target, num_rows, K=width, BK=length, **constants, **launch
        )
        return
    num_segments = rows.segments.shape[1]
    _shrink_by_segment[(*grid, num_segments)](
        *shared,
        rows.segments,
        partials,
        site.target,
        num_rows,
        num_segments,
        K=width,
        PIECE=length,
        BK=min(length, 1024 if rows.most_in_segment <= 16 else 128),  # a tile of 64 KiB: small GPUs have 99
        BM=rows.most_in_segment,
        PRECISION=precision(x),
        **constants,
        **launch,
    )


def units(rows: LoraRows) -> tuple[Tensor, Tensor, Tensor]:
    """Slots, units and their number, or any tensors where there are none."""
    if rows.units is None or rows.num_units is None:
        return rows.slots, rows.slots, rows.slots
    return rows.slots, rows.units, rows.num_units


def program_rows(rows: LoraRows) -> int:
    """Programs that divide the units among them: one for each row, and for each part of one large rank.

    More for the parts of others would be in every launch that has none, where each costs a nanosecond or two.
    """
    return rows.slots.shape[0] + (PARTS - 1 if rows.divided else 0)


def precision(tensor: Tensor) -> str:
    """Of a dot: float32 is not to be rounded to tf32."""
    return "ieee" if tensor.element_size() == 4 else "tf32"
