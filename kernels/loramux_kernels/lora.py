"""LoRA of a batch whose rows belong to different adapters.

    out[i] += (x[i] · Aᵀ) · B      with the A and B of the adapter of row i

Rows of one adapter lie next to each other, so an adapter is a run of rows, and each run costs its own true rank.
B is stored transposed, [rank, out_features], and already carries the adapter's scaling (α/r). Hu et al., "LoRA", ICLR
2022, section 4.1; batching rows by adapter: Chen et al., "Punica", MLSys 2024.

On a GPU the product is two launches, shrink and expand, that find each row's tiles through tables of offsets into the
pool: so one CUDA graph serves every mix of adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from loramux_kernels.gated_activation import Activation

RANK_PAGE = 16
"""Ranks that the kernels work on at a time; what is beyond an adapter's rank is not read."""

PARTS, WHOLE = 16, 31
"""Into how many parts the work on an adapter of large rank is divided, and the number of what is not divided."""


class LoraTile(NamedTuple):
    """One adapter's share of one module's work in a step: rows `start` to `end` (exclusive)."""

    start: int
    end: int
    a: Tensor  # [rank, in_features]
    b: Tensor  # [rank, out_features], scaled


def lora_add_(out: Tensor, x: Tensor, tiles: Sequence[LoraTile]) -> Tensor:
    """Add each run's low-rank product to `out` in place: the reference, and what runs on a CPU.

    Args:
        out: [rows, out_features], the base layer's output.
        x: [rows, in_features], the base layer's input, of the same dtype.
        tiles: runs that do not overlap; rows outside every run stay as they are.
    """
    for start, end, a, b in tiles:
        out[start:end].addmm_(x[start:end].mm(a.t()), b)
    return out


@dataclass(frozen=True, slots=True)
class LoraWeights:
    """Every resident adapter: a pool of elements, and where in it each slot's tiles are.

    `elements` [n] in the served dtype; `a_offsets` and `b_offsets` int64 [slots, targets], multiples of 8 elements;
    `ranks` int32 [slots, targets], 0 where the slot's adapter does not touch the target.
    """

    elements: Tensor
    a_offsets: Tensor
    b_offsets: Tensor
    ranks: Tensor
    max_rank: int  # no adapter has a larger one

    @property
    def num_targets(self) -> int:
        """Modules that an adapter may touch."""
        return self.ranks.shape[1]


@dataclass(frozen=True, slots=True)
class LoraRows:
    """Which adapter each row of a batch has, and how the work is divided.

    `slots` int32 [rows], -1 for none. Where many rows share an adapter, `segments` int32 [4, n]: first row, last row
    (exclusive), slot and part of runs of at most `most_in_segment` rows; unused ones at the end are empty. What comes
    out for a row in no segment is whatever lay there: it must be padding. Without segments the kernels work row by row.

    Where an adapter's rank is large, the work is `divided`: into the parts that segments name, or row by row into
    `units` int32 [rows + PARTS or more], `row · 32 + part`, of which `num_units` int32 [1] are in use and the others
    -1: first one for each row, then further parts of rows whose rank is large.
    """

    slots: Tensor
    segments: Tensor | None = None
    most_in_segment: int = 1
    divided: bool = False
    units: Tensor | None = None
    num_units: Tensor | None = None


@dataclass(frozen=True, slots=True)
class LoraSite:
    """Sibling projections that share an input: targets `target`, `target + 1`, … with outputs side by side."""

    target: int
    widths: tuple[int, ...]  # out_features of each, three at most


def piece_length(in_features: int, most_in_segment: int) -> int:
    """How many inputs one program of the shrink sums over: a power of two.

    Short pieces fill the GPU where a step is bound by the bytes of A; in a long prefill there are rows enough, and
    each further piece is one more partial sum that every program of the expand reads.
    """
    shortest, most_pieces = (512, 16) if most_in_segment <= 16 else (2048, 8)
    length = shortest
    while length * most_pieces < in_features:
        length *= 2
    return length


def lora_delta(x: Tensor, weights: LoraWeights, rows: LoraRows, site: LoraSite) -> Tensor:
    """What the adapters add to the outputs of a site, as a tensor of its own.

    Args:
        x: [rows, in_features], contiguous.

    Returns:
        [rows, sum of the site's widths] in the dtype of `x`; zeros in rows without an adapter.
    """
    out = x.new_empty(x.shape[0], sum(site.widths))
    _launch(x, weights, rows, site, out, add=False)
    return out


def lora_delta_add_(out: Tensor, x: Tensor, weights: LoraWeights, rows: LoraRows, site: LoraSite) -> Tensor:
    """Add the adapters' outputs of a site to `out` [rows, sum of the site's widths], contiguous, in place."""
    _launch(x, weights, rows, site, out, add=True)
    return out


def lora_gated_activation(
    x: Tensor, gate_up: Tensor, weights: LoraWeights, rows: LoraRows, site: LoraSite, activation: Activation
) -> Tensor:
    """act(gate + its delta) ⊙ (up + its delta) for many rows, without the deltas going through memory.

    Args:
        x: [rows, in_features], what gate and up were computed from; gate_up: [rows, 2n], contiguous.
        rows: in segments.

    Returns:
        [rows, n] in the dtype of `gate_up`; rows that are in no segment are not written.
    """
    from loramux_kernels import lora_gated_triton

    partials = _shrink(x, weights, rows, site)
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    lora_gated_triton.expand_gated(partials, weights, rows, site, gate_up, out, activation)
    return out


def _launch(x: Tensor, weights: LoraWeights, rows: LoraRows, site: LoraSite, out: Tensor, *, add: bool) -> None:
    from loramux_kernels import lora_expand_triton

    lora_expand_triton.expand(_shrink(x, weights, rows, site), weights, rows, site, out, add=add)


def _shrink(x: Tensor, weights: LoraWeights, rows: LoraRows, site: LoraSite) -> Tensor:
    """Partial sums float32 [pieces, siblings, rows, most ranks]."""
    from loramux_kernels import lora_shrink_triton

    pieces = -(-x.shape[1] // piece_length(x.shape[1], rows.most_in_segment))
    shape = (pieces, len(site.widths), x.shape[0], -(-weights.max_rank // RANK_PAGE) * RANK_PAGE)
    partials = torch.empty(shape, dtype=torch.float32, device=x.device)
    lora_shrink_triton.shrink(x, weights, rows, site, partials)
    return partials
