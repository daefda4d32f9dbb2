"""The gated activation of a feed-forward block.

    out = act(gate) ⊙ up      with gate and up side by side in one row

SiLU (SwiGLU) or GELU in its tanh form (GeGLU). Shazeer, "GLU Variants Improve Transformer", 2020.
"""

from __future__ import annotations

from enum import IntEnum

import torch.nn.functional as F
from torch import Tensor


class Activation(IntEnum):
    """The function on the gate; the values are what the kernels are compiled for."""

    SILU = 1
    GELU_TANH = 2


def gated_activation_reference(gate_up: Tensor, activation: Activation) -> Tensor:
    """In torch: gate_up [rows, 2n] → [rows, n]."""
    gate, up = gate_up.float().chunk(2, dim=-1)
    acted = F.silu(gate) if activation is Activation.SILU else F.gelu(gate, approximate="tanh")
    return (acted * up).to(gate_up.dtype)


def gated_activation(gate_up: Tensor, activation: Activation) -> Tensor:
    """gate_up [rows, 2n], contiguous → [rows, n] of the same dtype."""
    from loramux_kernels import gated_activation_triton

    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    gated_activation_triton.launch(gate_up, out, int(activation))
    return out
