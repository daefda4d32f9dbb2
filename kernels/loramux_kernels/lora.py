"""LoRA of a batch whose rows belong to different adapters.

    out[i] += (x[i] · Aᵀ) · Bᵀ      with the A and B of the adapter of row i

Rows of one adapter lie next to each other, so an adapter is a run of rows, and each run costs its own true rank.
B is stored transposed and already carries the adapter's scaling (α/r). Hu et al., "LoRA", ICLR 2022, section 4.1;
batching rows by adapter: Chen et al., "Punica", MLSys 2024.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class LoraTile(NamedTuple):
    """One adapter's share of one module's work in a step: rows `start` to `end` (exclusive)."""

    start: int
    end: int
    a: Tensor  # [rank, in_features]
    b: Tensor  # [rank, out_features], scaled


def lora_add_(out: Tensor, x: Tensor, tiles: Sequence[LoraTile]) -> Tensor:
    """Add each run's low-rank product to `out` in place.

    Args:
        out: [rows, out_features], the base layer's output.
        x: [rows, in_features], the base layer's input, of the same dtype.
        tiles: runs that do not overlap; rows outside every run stay as they are.
    """
    for start, end, a, b in tiles:
        out[start:end].addmm_(x[start:end].mm(a.t()), b)
    return out
