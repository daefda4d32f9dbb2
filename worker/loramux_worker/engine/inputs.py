"""The inputs of a step on the device: one buffer, one copy from the host, and views into it.

Where everything lies depends on the shape of the step alone, so a CUDA graph of one shape finds its inputs at the same
addresses each time.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loramux_kernels import AttentionBatch, LoraRows
from loramux_kernels.lora import PARTS
from loramux_worker.engine.block_tables import BlockTables

_ALIGNMENT = 4  # elements of a vector load
_STAGES = 3  # steps whose copies may be under way


@dataclass(frozen=True, slots=True)
class StepShape:
    """How many rows, sequences and LoRA segments there is room for, and how many rows a sequence may have."""

    tokens: int
    sequences: int
    segments: int = 0  # 0: LoRA row by row
    rows_in_segment: int = 1
    divided: bool = False  # the LoRA work on large ranks is in parts
    most_query_tokens: int = 1

    @property
    def is_decode(self) -> bool:
        """One token of every sequence."""
        return self.most_query_tokens == 1

    @property
    def sizes(self) -> dict[str, int]:
        """Elements of each input, in their order."""
        return {
            "ids": self.tokens,
            "sources": self.tokens,
            "positions": self.tokens,
            "slot_mapping": self.tokens,
            "adapters": self.tokens,
            "query_starts": self.sequences + 1,
            "context_lens": self.sequences,
            "table_rows": self.sequences,
            "logit_rows": self.sequences,
            "num_units": 1,
            "units": self.units,
            "segments": 4 * self.segments,
        }

    @property
    def units(self) -> int:
        """Room for a unit of LoRA work for each row, and for the parts of some adapters of large rank."""
        return 2 * self.tokens + PARTS if self.divided and not self.segments else 0


class StepInputs:
    """Views of a buffer, by the name of the input, for one shape: numpy on the host, torch on the device."""

    def __init__(self, shape: StepShape, host: NDArray[np.int32], device: Tensor) -> None:
        self.shape = shape
        sizes = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in shape.sizes.values()]
        ends = list(accumulate(sizes))
        self.used = ends[-1]
        spans = {
            name: slice(end - padded, end - padded + size)
            for (name, size), end, padded in zip(shape.sizes.items(), ends, sizes, strict=True)
        }
        self.host = {name: host[span] for name, span in spans.items()}
        self.device = {name: device[span] for name, span in spans.items()}

    def attention(self, block_tables: Tensor) -> AttentionBatch:
        """The layout of the batch, as the kernels take it."""
        return AttentionBatch(
            query_starts=self.device["query_starts"],
            context_lens=self.device["context_lens"],
            block_tables=block_tables,
            table_rows=self.device["table_rows"],
            slot_mapping=self.device["slot_mapping"],
            most_query_tokens=self.shape.most_query_tokens,
        )

    def lora_rows(self) -> LoraRows:
        """The adapter of every row."""
        shape, adapters = self.shape, self.device["adapters"]
        if shape.segments:
            segments = self.device["segments"].view(4, -1)
            return LoraRows(adapters, segments, shape.rows_in_segment, shape.divided)
        if shape.divided:
            units, count = self.device["units"], self.device["num_units"]
            return LoraRows(adapters, divided=True, units=units, num_units=count)
        return LoraRows(adapters)


class InputBuffers:
    """One buffer on the device, and pinned ones on the host that take turns."""

    def __init__(self, largest: StepShape, most_updates: int, device: torch.device) -> None:
        capacity = sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in largest.sizes.values())
        self._updates_at = capacity
        capacity += 2 * most_updates
        self._most_updates = most_updates
        self._pinned = device.type == "cuda"
        self.device = torch.zeros(capacity, dtype=torch.int32, device=device)
        self._hosts = deque(torch.zeros(capacity, dtype=torch.int32, pin_memory=self._pinned) for _ in range(_STAGES))
        self._copied: deque[torch.cuda.Event | None] = deque([None] * _STAGES)

    def begin(self, shape: StepShape) -> StepInputs:
        """Inputs to be filled on the host: the buffer whose copy was started longest ago."""
        event = self._copied[0]
        if event is not None:
            event.synchronize()
        return StepInputs(shape, self._hosts[0].numpy(), self.device)

    def static(self, shape: StepShape) -> StepInputs:
        """The inputs of that shape on the device, for a graph to be captured over."""
        return StepInputs(shape, self._hosts[0].numpy(), self.device)

    def send(self, inputs: StepInputs, tables: BlockTables) -> None:
        """Start the copy of what was filled in, and of the blocks that are new in the tables."""
        host = self._hosts[0]
        self.device[: inputs.used].copy_(host[: inputs.used], non_blocking=True)
        positions, values = tables.drain()
        for first in range(0, len(positions), self._most_updates):
            if first:
                torch.cuda.current_stream().synchronize()  # the staging area is used again
            piece = slice(first, first + self._most_updates)
            self._write(host, tables.device, positions[piece], values[piece])
        self._hosts.rotate(-1)
        self._copied.rotate(-1)
        if self._pinned:
            event = torch.cuda.Event()
            event.record()
            self._copied[-1] = event

    def _write(self, host: Tensor, table: Tensor, positions: NDArray[np.int32], values: NDArray[np.int32]) -> None:
        count, at = len(positions), self._updates_at
        staged = host.numpy()
        staged[at : at + count], staged[at + count : at + 2 * count] = positions, values
        self.device[at : at + 2 * count].copy_(host[at : at + 2 * count], non_blocking=True)
        where, what = self.device[at : at + count], self.device[at + count : at + 2 * count]
        table.view(-1).index_copy_(0, where.long(), what)
