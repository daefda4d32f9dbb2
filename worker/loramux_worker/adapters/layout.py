"""How an adapter lies in memory: one run of elements at its true rank, on the host and in the gpu pool alike.

    A of every module, in target order, then Bᵀ of every module, in target order, then what is neither

A tile of A is [rank, in_features], one of Bᵀ [rank, out_features], both contiguous. Modules that share an input (q, k
and v; gate and up) follow one another in target order, so their A tiles are adjacent rows of one matrix. Each tile
starts at a multiple of `ALIGNMENT` elements, which is 16 bytes in a 16-bit dtype: one vector load.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from loramux_worker.adapters.targets import TargetModule

ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class ModuleLayout:
    """One module's tiles: A [rank, in_features] at `a_offset`, Bᵀ [rank, out_features] at `b_offset`, in elements."""

    target: int
    rank: int
    in_features: int
    out_features: int
    a_offset: int
    b_offset: int

    def a(self, run: Tensor) -> Tensor:
        """A [rank, in_features] of the run that this layout describes: a view."""
        return run[self.a_offset :][: self.rank * self.in_features].view(self.rank, self.in_features)

    def b(self, run: Tensor) -> Tensor:
        """Bᵀ [rank, out_features], scaled: a view."""
        return run[self.b_offset :][: self.rank * self.out_features].view(self.rank, self.out_features)


MAGNITUDE = "lora_magnitude_vector"
"""The name that DoRA's magnitudes of a module go by."""

TRAINED_TOKENS = "trainable_tokens_delta"
"""The name that an embedding's vectors of single tokens go by."""


@dataclass(frozen=True, slots=True)
class OwnTensor:
    """A tensor that stands in place of a parameter of the model's or of some rows of one, or a module's magnitudes."""

    module: str  # as in `named_modules()`
    parameter: str  # of the module, or `MAGNITUDE`, or `TRAINED_TOKENS`
    shape: tuple[int, ...]
    token_ids: tuple[int, ...] = ()  # of the rows of `TRAINED_TOKENS`
    offset: int = 0

    def view(self, run: Tensor) -> Tensor:
        """The tensor in the run that this layout describes: a view."""
        return run[self.offset :][: math.prod(self.shape)].view(self.shape)


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """The modules of an adapter in target order, and the length of its run: a multiple of `ALIGNMENT`."""

    modules: tuple[ModuleLayout, ...]
    num_elements: int
    own: tuple[OwnTensor, ...] = ()

    @property
    def rank(self) -> int:
        """The largest rank of any module: what the scheduler counts."""
        return max((module.rank for module in self.modules), default=0)

    @classmethod
    def plan(
        cls, ranks: Iterable[tuple[int, int]], targets: Sequence[TargetModule], own: Sequence[OwnTensor] = ()
    ) -> AdapterLayout:
        """Lay out an adapter given as (target index, rank), in target order, and tensors whose place is not known."""
        shapes = [(target, rank, targets[target].in_features, targets[target].out_features) for target, rank in ranks]
        a_offsets, end = _place((rank * width for _, rank, width, _ in shapes), 0)
        b_offsets, end = _place((rank * width for _, rank, _, width in shapes), end)
        own_offsets, end = _place((math.prod(tensor.shape) for tensor in own), end)
        modules = (ModuleLayout(*shape, a, b) for shape, a, b in zip(shapes, a_offsets, b_offsets, strict=True))
        placed = (replace(tensor, offset=at) for tensor, at in zip(own, own_offsets, strict=True))
        return cls(tuple(modules), end, tuple(placed))


def _place(sizes: Iterable[int], start: int) -> tuple[list[int], int]:
    """Offsets of tiles of these sizes from `start` on, and where the last ends; all aligned."""
    offsets = []
    for size in sizes:
        offsets.append(start)
        start += -(-size // ALIGNMENT) * ALIGNMENT
    return offsets, start
