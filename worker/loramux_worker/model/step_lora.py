"""The adapters of a batch, as a CPU computes them run by run and a GPU in two launches a site."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from loramux_kernels import (
    Activation,
    LoraRows,
    LoraSite,
    LoraTile,
    LoraWeights,
    gated_linear,
    is_for_library,
    lora_add_,
    lora_delta,
    lora_delta_add_,
    lora_gated_activation,
)
from loramux_worker.adapters.tiles import AdapterTiles


class AdapterRun(NamedTuple):
    """Rows `start` to `end` (exclusive) of a batch that have one adapter, and its tiles by target module."""

    start: int
    end: int
    tiles: AdapterTiles


class RunsLora:
    """Runs of rows with torch's own products."""

    def __init__(self, runs: Sequence[AdapterRun]) -> None:
        """The runs in the order of their rows."""
        self._runs = runs
        self._spans: list[tuple[int, AdapterTiles | None]] = []  # rows and their adapter, from the first row on
        self._end = 0
        for run in runs:
            if run.start > self._end:
                self._spans.append((run.start - self._end, None))
            self._spans.append((run.end - run.start, run.tiles))
            self._end = run.end

    def tiles(self, target: int) -> tuple[LoraTile, ...]:
        """The runs whose adapter touches a target."""
        return tuple(LoraTile(r.start, r.end, *tile) for r in self._runs if (tile := r.tiles[target]) is not None)

    def add_(self, out: Tensor, x: Tensor, target: int) -> None:
        """See `StepLora`."""
        lora_add_(out, x, self.tiles(target))

    def add_site_(self, out: Tensor, x: Tensor, site: LoraSite) -> None:
        """See `StepLora`."""
        spans = self._spans if self._end == len(x) else [*self._spans, (len(x) - self._end, None)]
        lengths = [length for length, _ in spans]
        pieces = zip(spans, x.split_with_sizes(lengths), out.split_with_sizes(lengths), strict=True)
        for (_, adapter), rows, places in pieces:
            if adapter is None or (tiles := adapter.at(site)) is None:
                continue
            shrunk = rows.mm(tiles.a)
            if tiles.whole is not None:
                places.addmm_(shrunk, tiles.whole)
                continue
            parts, factors = places.split_with_sizes(site.widths, 1), shrunk.split_with_sizes(tiles.ranks, 1)
            for part, factor, b in zip(parts, factors, tiles.b, strict=True):
                if b is not None:
                    part.addmm_(factor, b)

    def delta(self, x: Tensor, site: LoraSite) -> Tensor:
        """See `StepLora`."""
        out = x.new_zeros(x.shape[0], sum(site.widths))
        self.add_site_(out, x, site)
        return out

    def gated_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, site: LoraSite, activation: Activation
    ) -> Tensor:
        """See `StepLora`."""
        return gated_linear(x, weight, activation, bias, self.delta(x, site))


@dataclass(frozen=True, slots=True)
class PooledLora:
    """Rows with kernels that find the tiles in the pool."""

    weights: LoraWeights
    rows: LoraRows

    def add_(self, out: Tensor, x: Tensor, target: int) -> None:
        """See `StepLora`."""
        self.add_site_(out, x, LoraSite(target, (out.shape[1],)))

    def add_site_(self, out: Tensor, x: Tensor, site: LoraSite) -> None:
        """See `StepLora`."""
        lora_delta_add_(out, x, self.weights, self.rows, site)

    def delta(self, x: Tensor, site: LoraSite) -> Tensor:
        """See `StepLora`."""
        return lora_delta(x, self.weights, self.rows, site)

    def gated_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, site: LoraSite, activation: Activation
    ) -> Tensor:
        """See `StepLora`."""
        in_segments = self.rows.segments is not None and len(site.widths) == 2
        if in_segments and is_for_library(x, weight.shape[0] // 2):
            gate_up = F.linear(x, weight, bias)
            return lora_gated_activation(x, gate_up, self.weights, self.rows, site, activation)
        return gated_linear(x, weight, activation, bias, self.delta(x, site))
