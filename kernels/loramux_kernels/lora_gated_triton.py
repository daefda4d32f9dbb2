"""The second half of LoRA and the gated activation in one launch, for many rows.

    out = act(gate + Bᵀg · hg) ⊙ (up + Bᵀu · hu)

In a long prefill the deltas of gate and up would be most of what goes through memory: here they never do. The rows come
in segments, see `lora_shrink_triton.py`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from loramux_kernels.backend import pdl
from loramux_kernels.gated_activation import Activation
from loramux_kernels.gated_activation_triton import activate
from loramux_kernels.lora import RANK_PAGE, WHOLE, LoraRows, LoraSite, LoraWeights
from loramux_kernels.lora_expand_triton import hidden_rows
from loramux_kernels.lora_shrink_triton import adapter_tile, precision

_R = tl.constexpr(RANK_PAGE)
_WHOLE = tl.constexpr(WHOLE)


@triton.jit(do_not_specialize=["target", "T", "G"])
def _expand_gated_by_segment(
    partials, elements, b_offsets, ranks, segments, gate_up, out, target, T, G,
    N: tl.constexpr, PIECES: tl.constexpr, NUM_TARGETS: tl.constexpr, RANKS: tl.constexpr, GATE: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    g = tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
    start, end, part = tl.load(segments + g), tl.load(segments + G + g), tl.load(segments + 3 * G + g)
    if start >= end or (part > 0 and part != _WHOLE):  # the first part does all: there are programs enough
        return
    slot = tl.load(segments + 2 * G + g)
    gate_b, gate_rank = adapter_tile(elements, b_offsets, ranks, slot, target, NUM_TARGETS)
    up_b, up_rank = adapter_tile(elements, b_offsets, ranks, slot, target + 1, NUM_TARGETS)
    r, n, m = tl.arange(0, _R), tl.program_id(0) * BN + tl.arange(0, BN), start + tl.arange(0, BM)
    if PDL:
        gdc_wait()
    inside = (m[:, None] < end) & (n[None, :] < N)
    x = gate_up + m[:, None].to(tl.int64) * (2 * N) + n[None, :]
    gate = tl.load(x, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + N, mask=inside, other=0.0).to(tl.float32)
    h = partials + m[:, None].to(tl.int64) * RANKS + r[None, :]
    for page in range(0, gate_rank, _R):
        hidden = hidden_rows(h + page, (m[:, None] < end) & (r[None, :] < gate_rank - page), T, PIECES, 2 * RANKS)
        known = (r[:, None] < gate_rank - page) & (n[None, :] < N)
        tile = tl.load(gate_b + (page + r[:, None]) * N + n[None, :], mask=known, other=0.0)
        gate = tl.dot(hidden.to(tile.dtype), tile, gate, input_precision=PRECISION)
    h += T.to(tl.int64) * RANKS
    for page in range(0, up_rank, _R):
        hidden = hidden_rows(h + page, (m[:, None] < end) & (r[None, :] < up_rank - page), T, PIECES, 2 * RANKS)
        known = (r[:, None] < up_rank - page) & (n[None, :] < N)
        tile = tl.load(up_b + (page + r[:, None]) * N + n[None, :], mask=known, other=0.0)
        up = tl.dot(hidden.to(tile.dtype), tile, up, input_precision=PRECISION)
    y = activate(gate.to(out.dtype.element_ty).to(tl.float32), GATE) * up
    tl.store(out + m[:, None].to(tl.int64) * N + n[None, :], y.to(out.dtype.element_ty), mask=inside)


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
    _expand_gated_by_segment[(triton.cdiv(columns, 128), num_segments)](
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
        PRECISION=precision(out),
        PDL=use_pdl,
        num_warps=8 if rows.most_in_segment > 16 else 4,
        launch_pdl=use_pdl,
    )
