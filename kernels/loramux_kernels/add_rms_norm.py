"""Residual addition and root-mean-square norm.

    residual' = residual + Σ partials          x = residual' / sqrt(mean(residual'²) + ε) · g

Zhang and Sennrich, "Root Mean Square Layer Normalization", NeurIPS 2019. The sum takes in what a product that was split
over K left behind.
"""

from __future__ import annotations

import torch
from torch import Tensor


def add_rms_norm_reference(
    residual: Tensor, partials: Tensor | None, gain: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """In torch, in the shape of `add_rms_norm`."""
    if partials is not None:
        residual = (residual.float() + partials.float().sum(0)).to(residual.dtype)
    x = residual.float()
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * gain.float()
    return residual, x.to(residual.dtype)


def add_rms_norm(residual: Tensor, partials: Tensor | None, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add and normalise.

    Args:
        residual: [rows, hidden].
        partials: [pieces, rows, hidden] of any float dtype, or None when there is nothing to add.
        gain: [hidden].

    Returns:
        the new residual and its norm, each [rows, hidden] in the dtype of `residual`.
    """
    from loramux_kernels import add_rms_norm_triton

    out = torch.empty_like(residual)
    total = residual if partials is None else torch.empty_like(residual)
    add_rms_norm_triton.launch(residual, partials, gain, eps, total, out)
    return total, out
