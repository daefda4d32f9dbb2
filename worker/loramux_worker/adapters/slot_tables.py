"""The tables through which kernels find an adapter's tiles in the pool."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loramux_worker.adapters.layout import AdapterLayout


class PlacedModules(NamedTuple):
    """An adapter's layout as arrays over its modules, offsets relative to its run."""

    targets: NDArray[np.int64]
    a_offsets: NDArray[np.int64]
    b_offsets: NDArray[np.int64]
    ranks: NDArray[np.int32]

    @classmethod
    def of(cls, layout: AdapterLayout) -> PlacedModules:
        """The arrays of a layout."""
        modules = layout.modules
        return cls(
            np.array([module.target for module in modules], np.int64),
            np.array([module.a_offset for module in modules], np.int64),
            np.array([module.b_offset for module in modules], np.int64),
            np.array([module.rank for module in modules], np.int32),
        )


class SlotTables:
    """Offsets into the pool and ranks, by slot and target module.

    `a_offsets` and `b_offsets` int64 [max_slots, num_targets], in elements, and `ranks` int32 [max_slots, num_targets]
    lie on the device; rank 0 means that the slot's adapter does not touch the module, and a free slot touches none.
    `host_*` are the same as numpy arrays, `host_largest` has the largest rank of each slot. Changes are enqueued on the
    device's current stream.
    """

    def __init__(self, max_slots: int, num_targets: int, device: torch.device) -> None:
        shape = (max_slots, num_targets)
        self.host_a_offsets = np.zeros(shape, np.int64)
        self.host_b_offsets = np.zeros(shape, np.int64)
        self.host_ranks = np.zeros(shape, np.int32)
        self.host_largest = np.zeros(max_slots, np.int32)
        self.a_offsets = torch.zeros(shape, dtype=torch.int64, device=device)
        self.b_offsets = torch.zeros(shape, dtype=torch.int64, device=device)
        self.ranks = torch.zeros(shape, dtype=torch.int32, device=device)

    def place(self, slot: int, modules: PlacedModules, offset: int) -> None:
        """The slot's adapter lies at `offset` of the pool."""
        self.host_a_offsets[slot, modules.targets] = modules.a_offsets + offset
        self.host_b_offsets[slot, modules.targets] = modules.b_offsets + offset
        self.host_ranks[slot, modules.targets] = modules.ranks
        self.host_largest[slot] = modules.ranks.max(initial=0)
        self._upload(slot)

    def clear(self, slot: int) -> None:
        """The slot is free."""
        self.host_a_offsets[slot] = self.host_b_offsets[slot] = self.host_ranks[slot] = self.host_largest[slot] = 0
        self._upload(slot)

    def _upload(self, slot: int) -> None:
        _send(self.host_a_offsets[slot], self.a_offsets[slot])
        _send(self.host_b_offsets[slot], self.b_offsets[slot])
        _send(self.host_ranks[slot], self.ranks[slot])


def _send(row: NDArray[np.int64] | NDArray[np.int32], target: Tensor) -> None:
    """Enqueue the copy of a row as it is now: out of pinned memory of its own, so nobody waits for the device."""
    source = torch.from_numpy(row)
    target.copy_(source.pin_memory() if target.is_cuda else source, non_blocking=True)
