"""Matrix products of a step in Triton, for few rows: bound by the bytes of the weight.

    out = x · Wᵀ (+ bias) (+ delta)            or, gated,   act(x · Wgᵀ) ⊙ (x · Wuᵀ)    with W = [Wg; Wu]

Every program is resident in one wave with its piece of the weight on the way; a product over K that is split leaves
float32 partial sums for the kernel that follows. One row needs no tensor cores: a program keeps products in a tile
of registers and reduces once at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from loramux_kernels.backend import pdl
from loramux_kernels.gated_activation_triton import activate
from loramux_kernels.tiles import RowsTile, VectorTile


@triton.jit(do_not_specialize=["M"])
def _linear_rows(
    x, w, out, bias, delta, M,
    N: tl.constexpr, K: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr,
    SWAP: tl.constexpr, STAGES: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, DELTA: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (N + BN - 1) // BN
    KS: tl.constexpr = K // SPLIT
    if PDL:
        gdc_launch_dependents()
        if not DELTA:  # behind a shrink, x is complete when this starts: its weights need not wait for the expand
            gdc_wait()
    block, split = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS
    n, m, k = block * BN + tl.arange(0, BN), tl.program_id(1) * BM + tl.arange(0, BM), tl.arange(0, BK)
    m_in = m < M
    wn = n
    if N % BN != 0:
        wn = n % N
    w_row = w + wn[:, None].to(tl.int64) * K + split * KS + k[None, :]
    x_row = x + m[:, None].to(tl.int64) * K + split * KS + k[None, :]
    if SWAP:  # noqa: SIM108 - Triton compiles one branch only
        acc = tl.zeros((BN, BM), tl.float32)
    else:
        acc = tl.zeros((BM, BN), tl.float32)
    up = acc
    for i in tl.range(0, KS, BK, num_stages=STAGES):
        wt = tl.load(w_row + i)
        if GATE:
            ut = tl.load(w_row + N * K + i)
        xt = tl.load(x_row + i, mask=m_in[:, None], other=0.0)
        if SWAP:
            acc = tl.dot(wt, tl.trans(xt), acc, input_precision=PRECISION)
            if GATE:
                up = tl.dot(ut, tl.trans(xt), up, input_precision=PRECISION)
        else:
            acc = tl.dot(xt, tl.trans(wt), acc, input_precision=PRECISION)
            if GATE:
                up = tl.dot(xt, tl.trans(ut), up, input_precision=PRECISION)
    if SWAP:
        acc, up = tl.trans(acc), tl.trans(up)
    if PDL and DELTA:
        gdc_wait()
    WIDTH: tl.constexpr = 2 * N if GATE else N
    inside = m_in[:, None] & (n[None, :] < N)
    once = tl.where(split == 0, N, 0)  # of the pieces of a sum, one has what is added
    if BIAS:
        acc += tl.load(bias + n, mask=n < once, other=0.0).to(tl.float32)[None, :]
        if GATE:
            up += tl.load(bias + N + n, mask=n < once, other=0.0).to(tl.float32)[None, :]
    if DELTA:
        d = delta + m[:, None].to(tl.int64) * WIDTH + n[None, :]
        first = m_in[:, None] & (n[None, :] < once)
        acc += tl.load(d, mask=first, other=0.0).to(tl.float32)
        if GATE:
            up += tl.load(d + N, mask=first, other=0.0).to(tl.float32)
    if GATE:
        acc = activate(acc.to(x.dtype.element_ty).to(tl.float32), GATE) * up
    o = out + (split * M + m[:, None]).to(tl.int64) * N + n[None, :]
    tl.store(o, acc.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _linear_vector(
    x, w, out, bias, delta,
    N: tl.constexpr, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr,
    DELTA: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    n, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    wn = n
    if N % BN != 0:
        wn = n % N
    w_row = w + wn[:, None].to(tl.int64) * K + k[None, :]
    wt = tl.load(w_row)
    if GATE:
        ut = tl.load(w_row + N * K)
    if PDL and not DELTA:
        gdc_wait()
    xs = tl.load(x + k).to(tl.float32)[None, :]
    acc = wt.to(tl.float32) * xs
    if GATE:
        up = ut.to(tl.float32) * xs
    for i in tl.range(BK, K, BK):
        wt = tl.load(w_row + i)
        if GATE:
            ut = tl.load(w_row + N * K + i)
        xs = tl.load(x + i + k).to(tl.float32)[None, :]
        acc += wt.to(tl.float32) * xs
        if GATE:
            up += ut.to(tl.float32) * xs
    y = tl.sum(acc, 1)
    if PDL and DELTA:
        gdc_wait()
    n_in = n < N
    if BIAS:
        y += tl.load(bias + n, mask=n_in, other=0.0).to(tl.float32)
    if DELTA:
        y += tl.load(delta + n, mask=n_in, other=0.0).to(tl.float32)
    if GATE:
        z = tl.sum(up, 1)
        if BIAS:
            z += tl.load(bias + N + n, mask=n_in, other=0.0).to(tl.float32)
        if DELTA:
            z += tl.load(delta + N + n, mask=n_in, other=0.0).to(tl.float32)
        y = activate(y.to(x.dtype.element_ty).to(tl.float32), GATE) * z
    tl.store(out + n, y.to(out.dtype.element_ty), mask=n_in)


def rows(
    x: Tensor, weight: Tensor, out: Tensor, tile: RowsTile, bias: Tensor | None, delta: Tensor | None, gate: int
) -> None:
    """Launch over rows of `x` [M, K]; `out` is [tile.split, M, N]."""
    num_rows, width = x.shape
    columns = out.shape[-1]
    use_pdl = pdl(x.device)
    block = max(16, min(128, triton.next_power_of_2(num_rows)))
    grid = (triton.cdiv(columns, tile.columns) * tile.split, triton.cdiv(num_rows, block))
    _linear_rows[grid](
        x,
        weight,
        out,
        x if bias is None else bias,
        x if delta is None else delta,
        num_rows,
        N=columns,
        K=width,
        BM=block,
        BN=tile.columns,
        BK=tile.inner,
        SPLIT=tile.split,
        SWAP=tile.swap,
        STAGES=tile.stages,
        GATE=gate,
        BIAS=bias is not None,
        DELTA=delta is not None,
        PRECISION="ieee" if x.element_size() == 4 else "tf32",
        PDL=use_pdl,
        num_warps=tile.warps,
        launch_pdl=use_pdl,
    )


def vector(
    x: Tensor, weight: Tensor, out: Tensor, tile: VectorTile, bias: Tensor | None, delta: Tensor | None, gate: int
) -> None:
    """Launch over the one row of `x` [1, K]."""
    use_pdl = pdl(x.device)
    columns = out.shape[-1]
    _linear_vector[(triton.cdiv(columns, tile.columns),)](
        x,
        weight,
        out,
        x if bias is None else bias,
        x if delta is None else delta,
        N=columns,
        K=x.shape[1],
        BN=tile.columns,
        BK=tile.inner,
        GATE=gate,
        BIAS=bias is not None,
        DELTA=delta is not None,
        PDL=use_pdl,
        num_warps=tile.warps,
        launch_pdl=use_pdl,
    )
