"""Residual addition and norm in Triton: a program a row, the row in registers."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from loramux_kernels.backend import pdl


@triton.jit(do_not_specialize=["T"])
def _add_rms_norm(
    residual, partials, gain, total, out, T,
    H: tl.constexpr, BLOCK: tl.constexpr, PIECES: tl.constexpr, EPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    t, n = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    inside = n < H
    g = tl.load(gain + n, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_wait()
    x = tl.load(residual + t * H + n, mask=inside, other=0.0).to(tl.float32)
    if PIECES > 0:
        for piece in tl.static_range(PIECES):
            x += tl.load(partials + (piece * T + t) * H + n, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(total.dtype.element_ty)
        tl.store(total + t * H + n, rounded, mask=inside)
        x = rounded.to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, 0) / H + EPS) * g
    tl.store(out + t * H + n, y.to(out.dtype.element_ty), mask=inside)


def launch(residual: Tensor, partials: Tensor | None, gain: Tensor, eps: float, total: Tensor, out: Tensor) -> None:
    """Write `total` (unless `partials` is None) and `out`, all [rows, hidden]."""
    use_pdl = pdl(out.device)
    num_rows, hidden = out.shape
    block = triton.next_power_of_2(hidden)
    _add_rms_norm[(num_rows,)](
        residual,
        residual if partials is None else partials,
        gain,
        total,
        out,
        num_rows,
        H=hidden,
        BLOCK=block,
        PIECES=0 if partials is None else partials.shape[0],
        EPS=eps,
        PDL=use_pdl,
        num_warps=8 if block >= 2048 else 4,
        launch_pdl=use_pdl,
    )
