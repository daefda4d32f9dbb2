"""The tiles of an adapter in the pool, by target module, and what those of one site are together."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from loramux_kernels import LoraSite

Tile = tuple[Tensor, Tensor]
"""Views of one module's A [rank, in_features] and Bᵀ [rank, out_features] in the pool."""


_FEW_ELEMENTS = 1 << 15  # of Bᵀ as one: a product of so many, zeros among them, costs less than another call


class SiteTiles(NamedTuple):
    """An adapter's tiles of sibling modules: one A for all that the adapter touches, and the Bᵀ of each.

    `whole` [sum of ranks, sum of widths] has each Bᵀ in its own rows and columns and zeros elsewhere; None where it
    would be large.
    """

    a: Tensor  # transposed, [in_features, sum of ranks]
    ranks: tuple[int, ...]  # of each sibling, 0 where the adapter does not touch it
    b: tuple[Tensor | None, ...]
    whole: Tensor | None


class AdapterTiles(list[Tile | None]):
    """By target index, None where the adapter does not touch the module."""

    def __init__(self, tiles: Sequence[Tile | None]) -> None:
        super().__init__(tiles)
        self._sites: dict[tuple[int, int], SiteTiles | None] = {}

    def at(self, site: LoraSite) -> SiteTiles | None:
        """The tiles of a site, None where the adapter touches no module of it."""
        key = site.target, site.target + len(site.widths)
        if key not in self._sites:
            self._sites[key] = _join(self[slice(*key)], site.widths)
        return self._sites[key]


def _join(tiles: Sequence[Tile | None], widths: Sequence[int]) -> SiteTiles | None:
    touched = [tile[0] for tile in tiles if tile is not None]
    if not touched:
        return None
    ranks = tuple(0 if tile is None else len(tile[0]) for tile in tiles)
    b = tuple(None if tile is None else tile[1] for tile in tiles)
    whole = b[0] if len(b) == 1 else None
    if len(b) > 1 and sum(ranks) * sum(widths) <= _FEW_ELEMENTS:
        first = touched[0]
        whole = torch.block_diag(
            *(first.new_zeros(0, width) if m is None else m for m, width in zip(b, widths, strict=True))
        )
    return SiteTiles(_stacked(touched).t(), ranks, b, whole)


def _stacked(matrices: Sequence[Tensor]) -> Tensor:
    """Matrices [any, n] one below the other: a view where they lie so, as they do in the pool, but for odd shapes."""
    first = matrices[0]
    memory = first.untyped_storage().data_ptr()
    if all(
        before.data_ptr() + before.nbytes == after.data_ptr() and after.untyped_storage().data_ptr() == memory
        for before, after in pairwise(matrices)
    ):
        return first.as_strided((sum(len(m) for m in matrices), first.shape[1]), first.stride())
    return torch.cat(list(matrices))
