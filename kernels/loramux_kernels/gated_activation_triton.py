"""act(gate) ⊙ up in Triton, and the activations as a piece of other kernels."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from loramux_kernels.backend import pdl

_BLOCK = 1024


@triton.jit
def activate(x, GATE: tl.constexpr):
    """float32 → float32; GATE 1: SiLU, 2: GELU in its tanh form."""
    if GATE == 1:
        return x / (1.0 + tl.exp(-x))
    # tanh(z) = 1 - 2 / (exp(2z) + 1)
    z = 0.7978845608028654 * (x + 0.044715 * x * x * x)
    return x * (1.0 - 1.0 / (tl.exp(2.0 * z) + 1.0))


@triton.jit
def _gated_activation(x, out, N: tl.constexpr, BLOCK: tl.constexpr, GATE: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    t, n = tl.program_id(1).to(tl.int64), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(x + t * 2 * N + n, mask=n < N, other=0.0).to(tl.float32)
    up = tl.load(x + t * 2 * N + N + n, mask=n < N, other=0.0).to(tl.float32)
    tl.store(out + t * N + n, (activate(gate, GATE) * up).to(out.dtype.element_ty), mask=n < N)


def launch(gate_up: Tensor, out: Tensor, gate: int) -> None:
    """gate_up [rows, 2n] → out [rows, n]."""
    use_pdl = pdl(out.device)
    num_rows, columns = out.shape
    grid = (triton.cdiv(columns, _BLOCK), num_rows)
    _gated_activation[grid](
        gate_up, out, N=columns, BLOCK=_BLOCK, GATE=gate, PDL=use_pdl, num_warps=4, launch_pdl=use_pdl
    )
