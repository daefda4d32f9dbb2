"""The block tables of running sequences on the device: a row each, kept from step to step."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from loramux_worker.engine.sequence import Sequence


class BlockTables:
    """Gives every running sequence a row, and sends on only the blocks that are new.

    `host` int32 [rows, most blocks] is up to date after `row_of`; `device` is the same once the changes that `drain`
    returns were written. The last row is nobody's, and full of a spare block: padding goes there.
    """

    def __init__(self, most_sequences: int, most_blocks: int, spare_block: int, device: torch.device) -> None:
        self.host: NDArray[np.int32] = np.full((most_sequences + 1, most_blocks), spare_block, np.int32)
        self.on_host = device.type == "cpu"
        self.device = torch.from_numpy(self.host) if self.on_host else torch.from_numpy(self.host).to(device)
        self.spare_row, self.spare_block = most_sequences, spare_block
        self._free = list(range(most_sequences))[::-1]
        self._rows: dict[int, int] = {}
        self._lengths = [0] * most_sequences
        self._changed: list[tuple[int, int, int]] = []  # row, first column, end

    def row_of(self, sequence: Sequence) -> int:
        """The sequence's row, with all of its blocks."""
        row = self._rows.get(sequence.sequence_id)
        if row is None:
            row = self._rows[sequence.sequence_id] = self._free.pop()
        known, table = self._lengths[row], sequence.block_table
        if len(table) > known:
            self.host[row, known : len(table)] = table[known:]
            self._changed.append((row, known, len(table)))
            self._lengths[row] = len(table)
        return row

    def release(self, sequence: Sequence) -> None:
        """The sequence holds no blocks any longer."""
        row = self._rows.pop(sequence.sequence_id, None)
        if row is not None:
            self._free.append(row)
            self._lengths[row] = 0

    def drain(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Flat positions in the table and what goes there, of all changes since the last call."""
        changed, self._changed = self._changed, []
        width = self.host.shape[1]
        if self.on_host or not changed:
            return np.empty(0, np.int32), np.empty(0, np.int32)
        positions = np.concatenate(
            [np.arange(row * width + a, row * width + b, dtype=np.int32) for row, a, b in changed]
        )
        return positions, self.host.reshape(-1)[positions]
