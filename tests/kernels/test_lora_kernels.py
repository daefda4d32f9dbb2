"""The LoRA kernels against one row at a time: mixed ranks, rows without an adapter, sites of several targets."""

from __future__ import annotations

import pytest
import torch
from kernel_devices import TOLERANCE, device_cases
from torch import Tensor

from loramux_kernels import LoraSite, LoraWeights, lora_delta, lora_delta_add_
from loramux_kernels.lora_plan import plan_rows

IN = 640  # more than one piece of the shrink, and a ragged one
WIDTHS = [(48,), (96, 32), (160, 48, 16)]
RANKS = (4, 16, 1, 40, 0, 150)  # of the slots: one does not touch the site, and the work on the last is divided


class Pool:
    """Random adapters of one site in a flat pool, every tile aligned as the pool aligns it."""

    def __init__(self, widths: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.first_target = 2
        shape = (len(RANKS), self.first_target + len(widths) + 1)
        a_offsets, b_offsets = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        ranks = torch.zeros(shape, dtype=torch.int32)
        self.tiles: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        pieces, end = [torch.randn(8, generator=generator)], 8
        for slot, rank in enumerate(RANKS):
            for s, width in enumerate(widths):
                target = self.first_target + s
                ranks[slot, target] = rank
                a = torch.randn(rank, IN, generator=generator) / IN**0.5
                b = torch.randn(rank, width, generator=generator)
                self.tiles[slot, s] = a.to(dtype), b.to(dtype)
                for offsets, tile in ((a_offsets, a), (b_offsets, b)):
                    offsets[slot, target] = end
                    padding = torch.full((-tile.numel() % 8,), torch.nan)
                    pieces += [tile.flatten(), padding]
                    end += tile.numel() + padding.numel()
        self.weights = LoraWeights(
            torch.cat(pieces).to(dtype).to(device),
            a_offsets.to(device),
            b_offsets.to(device),
            ranks.to(device),
            max_rank=max(RANKS),
        )
        self.site = LoraSite(self.first_target, widths)

    def expected(self, x: Tensor, slots: list[int]) -> Tensor:
        rows = []
        for row, slot in zip(x.double().cpu(), slots, strict=True):
            deltas = []
            for s, width in enumerate(self.site.widths):
                a, b = self.tiles.get((slot, s), (torch.zeros(0, IN), torch.zeros(0, width)))
                deltas.append((a.double() @ row) @ b.double())
            rows.append(torch.cat(deltas))
        return torch.stack(rows)


MIXES = {
    "one row": [3],
    "no adapter": [-1, -1, -1],
    "one row of large rank": [5],
    "all distinct": [-1, 0, 1, 2, 3, 4, 5],
    "runs": [-1] * 2 + [0] * 3 + [1] * 17 + [3] * 5 + [4] * 2,
    "runs of large rank": [0] * 2 + [5] * 18,
}

CASES = {
    f"{mix}, {len(widths)} targets, {'by row' if most == 1 else f'segments of {most}'}": (slots, widths, most)
    for mix, slots in MIXES.items()
    for widths in WIDTHS
    for most in (1, 16, 64)
}
BY_ROW, BY_SEGMENT, BY_LONG_SEGMENT = HOW = ("by row", "segments of 16", "segments of 64")
INTERPRETED = {
    "float32": [
        *(f"{mix}, 3 targets, {how}" for mix in ("one row", "no adapter") for how in HOW),
        *(f"runs, 3 targets, {how}" for how in (BY_SEGMENT, BY_LONG_SEGMENT)),
        f"one row of large rank, 1 targets, {BY_ROW}",
        f"all distinct, 3 targets, {BY_ROW}",
        f"runs of large rank, 1 targets, {BY_SEGMENT}",
        f"runs of large rank, 1 targets, {BY_LONG_SEGMENT}",
    ],
    "float16": [
        *(f"one row of large rank, 1 targets, {how}" for how in (BY_ROW, BY_SEGMENT)),
        *(f"runs, 1 targets, {how}" for how in (BY_SEGMENT, BY_LONG_SEGMENT)),
    ],
}


@pytest.mark.parametrize(("device", "dtype", "case"), device_cases(CASES, **INTERPRETED))
def test_each_row_gets_its_own_adapter(device, dtype, case):
    slots, widths, most_in_segment = case
    pool = Pool(widths, dtype, device)
    x = torch.randn(len(slots), IN, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    rows = plan_rows(slots, RANKS, most_in_segment, torch.device(device))
    expected = pool.expected(x, slots)

    delta = lora_delta(x, pool.weights, rows, pool.site)
    assert (delta.double().cpu() - expected).norm() <= TOLERANCE[dtype] * expected.norm().clamp(min=1e-9)

    base = torch.randn(len(slots), sum(widths), generator=torch.Generator().manual_seed(2)).to(dtype).to(device)
    added = lora_delta_add_(base.clone(), x, pool.weights, rows, pool.site)
    total = base.double().cpu() + expected
    assert (added.double().cpu() - total).norm() <= TOLERANCE[dtype] * total.norm()
    without = [row for row, slot in enumerate(slots) if slot in (-1, 4)]
    assert torch.equal(added[without], base[without])
