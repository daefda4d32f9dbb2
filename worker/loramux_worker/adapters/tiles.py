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


class SiteTiles(NamedTuple):
    """An adapter's tiles of sibling modules: one A for all that the adapter touches, and the Bᵀ of each."""

    a: Tensor  # transposed, [in_features, sum of ranks]
    ranks: tuple[int, ...]  # of each sibling, 0 where the adapter does not touch it
    b: tuple[Tensor | None, ...]


class AdapterTiles(list[Tile | None]):
    """By target index, None where the adapter does not touch the module."""

    def __init__(self, tiles: Sequence[Tile | None]) -> None:
        super().__init__(tiles)
        self._sites: dict[tuple[int, int], SiteTiles | None] = {}

    def at(self, site: LoraSite) -> SiteTiles | None:
        """The tiles of a site, None where the adapter touches no module of it."""
        key = site.target, site.target + len(site.widths)
        if key not in self._sites:
            self._sites[key] = _join(self[slice(*key)])
        return self._sites[key]


def _join(tiles: Sequence[Tile | None]) -> SiteTiles | None:
    touched = [tile[0] for tile in tiles if tile is not None]
    if not touched:
        return None
    ranks = tuple(0 if tile is None else tile[0].shape[0] for tile in tiles)
    return SiteTiles(_stacked(touched).t(), ranks, tuple(None if tile is None else tile[1] for tile in tiles))


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
