"""Dividing the LoRA work of a step, on the host: once a step, for all of its layers.

An adapter of rank 256 is 32 times the bytes of one of rank 8. Its work is divided into parts, so that no program of a
launch reads much more than any other and the small ones do not wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loramux_kernels.lora import PARTS, WHOLE, LoraRows

NO_ADAPTER = -1

LARGE_RANK = 64
"""The work on adapters of larger ranks is divided."""


class Segment(NamedTuple):
    """A run that LoRA kernels work on at once; of one with a large rank, one part of the work."""

    start: int
    end: int
    slot: int
    part: int = WHOLE


def divide(segments: Sequence[Segment], ranks: NDArray[np.int32], room: int) -> list[Segment]:
    """The same with the work of large ranks in parts, as long as there is room for them.

    Args:
        ranks: the largest rank of each slot.
        room: how many segments there may be.
    """
    divided: list[Segment] = []
    left = room - len(segments)
    for segment in segments:
        if left >= PARTS - 1 and segment.slot != NO_ADAPTER and ranks[segment.slot] > LARGE_RANK:
            divided += [segment._replace(part=part) for part in range(PARTS)]
            left -= PARTS - 1
        else:
            divided.append(segment)
    return divided


def lora_units(adapters: NDArray[np.int32], ranks: NDArray[np.int32], room: int) -> NDArray[np.int32]:
    """A unit of work for each row, `row · 32 + part`, and behind them further parts of rows whose rank is large.

    Args:
        adapters: the slot of each row.
        ranks: the largest rank of each slot.
        room: how many units there may be.
    """
    rows = np.arange(len(adapters), dtype=np.int32)
    large = np.flatnonzero((adapters != NO_ADAPTER) & (ranks[adapters] > LARGE_RANK)).astype(np.int32)
    large = large[: (room - len(rows)) // (PARTS - 1)]
    units = rows * 32 + WHOLE
    units[large] -= WHOLE
    further = large[:, None] * 32 + np.arange(1, PARTS, dtype=np.int32)
    return np.concatenate((units, further.ravel()))


def plan_rows(slots: Sequence[int], ranks: Sequence[int], most_in_segment: int, device: torch.device) -> LoraRows:
    """The whole plan of a batch whose rows are sorted by slot, for one-time use.

    Args:
        slots: of each row, `NO_ADAPTER` for none.
        ranks: the largest rank of each slot.
        most_in_segment: 1 for row by row.
    """
    adapters, largest = np.array(slots, np.int32), np.array(ranks, np.int32)

    def send(values: NDArray[np.int32]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values, np.int32)).to(device)

    divided = bool((largest[adapters[adapters != NO_ADAPTER]] > LARGE_RANK).any())
    segments = None
    if most_in_segment > 1:
        starts = [i for i, slot in enumerate(slots) if not i or slot != slots[i - 1]]
        ends = [*starts[1:], len(slots)]
        pieces = [
            Segment(at, min(at + most_in_segment, end), slots[start])
            for start, end in zip(starts, ends, strict=True)
            for at in range(start, end, most_in_segment)
        ]
        segments = send(np.array(divide(pieces, largest, 16 * len(pieces)), np.int32).T)
    elif divided:
        units = lora_units(adapters, largest, 16 * len(slots))
        padded = np.concatenate((units, np.full(PARTS, -1, np.int32)))
        count = np.array([len(units)], np.int32)
        return LoraRows(send(adapters), divided=True, units=send(padded), num_units=send(count))
    return LoraRows(send(adapters), segments, most_in_segment, divided)
