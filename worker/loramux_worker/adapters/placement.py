"""How an adapter's tensors come from its file to their places in memory, some megabytes at a time.

What lies in the file as it is wanted is read straight into its place. The rest goes through a scratch memory: every B
is transposed and scaled, and another dtype is cast. What is decided from the header alone is decided once for all
adapters that share it (`adapter_plan.py`): loads run beside the engine's thread, and while one of them runs Python, the
others and the engine do not.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from loramux_worker.adapters.safetensors_file import TensorEntry, TensorFile

_MOST_BYTES = 16 << 20  # of a piece
_MOST_READS = 512  # the system takes 1,024 in one call
_BITS = {2: torch.int16, 4: torch.int32}  # numpy has no bfloat16, and what is moved needs no meaning


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor goes: `offset` in elements of the run. With a `scaling` it is a B: transposed and scaled."""

    entry: TensorEntry
    offset: int
    scaling: float | None = None


@dataclass(frozen=True, slots=True)
class _Row:
    """Tensors of one shape, side by side from element `first` of a batch, at equal distances in the run: one copy."""

    first: int
    count: int
    shape: tuple[int, int]
    offset: int
    distance: int


@dataclass(frozen=True, slots=True)
class _Batch:
    """Tensors of one dtype and scaling, side by side from `start` to `end` of the scratch memory, in bytes."""

    start: int
    end: int
    dtype: torch.dtype
    scaling: float | None
    rows: tuple[_Row, ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """A range of the file that one call reads: spans of the run or of the scratch memory, and what is then to be done.

    `reads` are (into the run?, first byte, last byte exclusive).
    """

    start: int
    reads: tuple[tuple[bool, int, int], ...]
    batches: tuple[_Batch, ...]

    @property
    def scratch_bytes(self) -> int:
        """What it needs."""
        return max((batch.end for batch in self.batches), default=0)

    def read(self, file: TensorFile, scratch: Tensor, run: Tensor) -> None:
        """Read it into `scratch` (uint8, at least `scratch_bytes`) and the run, and put everything in its place."""
        inside, outside = run.view(torch.uint8).numpy().data, scratch.numpy().data
        file.read_spans([(inside if direct else outside)[first:last] for direct, first, last in self.reads], self.start)
        for batch in self.batches:
            _place(batch, scratch, run)


def plan_pieces(places: Iterable[Place], dtype: torch.dtype) -> tuple[Piece, ...]:
    """The pieces of a file in its order, for a run of `dtype`."""
    ordered = sorted(places, key=lambda place: place.entry.offset)
    return tuple(_piece(group, dtype) for group in _consecutive(ordered))


def _consecutive(places: Sequence[Place]) -> Iterator[list[Place]]:
    """Runs without a gap, not longer than a piece may be unless it is of one tensor."""
    group: list[Place] = []
    for place in places:
        entry = place.entry
        if group and (
            entry.offset != group[-1].entry.end
            or entry.end - group[0].entry.offset > _MOST_BYTES
            or len(group) == _MOST_READS
        ):
            yield group
            group = []
        group.append(place)
    if group:
        yield group


def _piece(group: Sequence[Place], dtype: torch.dtype) -> Piece:
    reads: dict[TensorEntry, tuple[bool, int, int]] = {}
    through: list[Place] = []
    for place in group:
        if place.scaling is None and place.entry.dtype == dtype:
            first = place.offset * dtype.itemsize
            reads[place.entry] = (True, first, first + place.entry.num_bytes)
        else:
            through.append(place)
    batches: list[_Batch] = []
    end = 0
    for (_, _, source, scaling), alike in groupby(sorted(through, key=_order), key=lambda place: _order(place)[:4]):
        start = end = -(-end // 8) * 8
        rows: list[_Row] = []
        for place in alike:
            rows = _lengthen(rows, place, (end - start) // source.itemsize)
            reads[place.entry] = (False, end, end + place.entry.num_bytes)
            end += place.entry.num_bytes
        batches.append(_Batch(start, end, source, scaling, tuple(rows)))
    return Piece(group[0].entry.offset, tuple(reads[place.entry] for place in group), tuple(batches))


def _order(place: Place) -> tuple[str, float, torch.dtype, float | None, tuple[int, ...], str, int]:
    """By dtype and scaling; then so that a module's tensors of all layers follow one another as they do in the run."""
    entry, scaling = place.entry, place.scaling
    kind = (str(entry.dtype), math.inf if scaling is None else scaling, entry.dtype, scaling)
    return (*kind, entry.shape, re.sub(r"\d+", "", entry.name), place.offset)


def _lengthen(rows: list[_Row], place: Place, first: int) -> list[_Row]:
    """With one more tensor, in the last row if it lies where that would go on."""
    shape = (place.entry.shape[0], math.prod(place.entry.shape[1:]))
    if rows and rows[-1].shape == shape:
        last = rows[-1]
        distance = place.offset - last.offset if last.count == 1 else last.distance
        if distance > 0 and place.offset == last.offset + last.count * distance:
            return [*rows[:-1], _Row(last.first, last.count + 1, shape, last.offset, distance)]
    return [*rows, _Row(first, 1, shape, place.offset, 0)]


def _place(batch: _Batch, scratch: Tensor, run: Tensor) -> None:
    """Scale and cast all of a batch in one go, then move its tensors to their places."""
    values = scratch[batch.start : batch.end].view(batch.dtype)
    if batch.scaling not in (None, 1.0):
        if values.dtype != run.dtype or not _is_exact(batch.scaling):
            values = values.float()  # torch rounds the scaling to what it multiplies
        values = values.mul_(batch.scaling)
    bits, item = _BITS[run.itemsize], run.itemsize
    source, target = values.to(run.dtype).view(bits).numpy(), run.view(bits).numpy()
    for row in batch.rows:
        height, width = row.shape
        tensors = source[row.first : row.first + row.count * height * width].reshape(row.count, height, width)
        if batch.scaling is not None:  # numpy transposes two to three times as fast as torch
            tensors, height, width = tensors.transpose(0, 2, 1), width, height
        strides = (row.distance * item, width * item, item)
        np.copyto(np.ndarray(tensors.shape, target.dtype, target, row.offset * item, strides), tensors)


def _is_exact(scaling: float) -> bool:
    """Whether a product with it in any float dtype is the same as one in float32 that is rounded: a power of two."""
    return math.frexp(scaling)[0] == 0.5 and 2.0**-14 <= scaling <= 2.0**15
