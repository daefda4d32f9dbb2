"""The LoRA kernels against one row at a time: mixed ranks, rows without an adapter, sites of several targets."""

from __future__ import annotations

import pytest
import torch
from kernel_devices import DEVICES, TOLERANCE
from torch import Tensor

from loramux_kernels import LoraRows, LoraSite, LoraWeights, lora_delta, lora_delta_add_

IN = 640  # more than one piece of the shrink, and a ragged one
WIDTHS = [(48,), (96, 32), (160, 48, 16)]
RANKS = (4, 16, 1, 40, 0)  # of the slots; the last has an adapter that does not touch the site


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


def grouped(slots: list[int], most: int, unused: int) -> Tensor:
    """The segments of rows that are sorted by slot."""
    segments: list[tuple[int, int, int]] = []
    for row, slot in enumerate(slots):
        if segments and segments[-1][2] == slot and row - segments[-1][0] < most:
            segments[-1] = (segments[-1][0], row + 1, slot)
        else:
            segments.append((row, row + 1, slot))
    return torch.tensor([*segments, *[(0, 0, -1)] * unused], dtype=torch.int32).t().contiguous()


MIXES = {
    "one row": [3],
    "no adapter": [-1, -1, -1],
    "all distinct": [0, 1, 2, 3, 4, -1],
    "runs": [-1] * 2 + [0] * 3 + [1] * 17 + [3] * 5 + [4] * 2,
}


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("slots", MIXES.values(), ids=MIXES)
@pytest.mark.parametrize("widths", WIDTHS, ids=len)
@pytest.mark.parametrize("most_in_segment", [1, 16, 64])
def test_each_row_gets_its_own_adapter(device, dtype, slots, widths, most_in_segment):
    pool = Pool(widths, dtype, device)
    x = torch.randn(len(slots), IN, generator=torch.Generator().manual_seed(1)).to(dtype).to(device)
    on_device = torch.tensor(slots, dtype=torch.int32, device=device)
    segments = grouped(slots, most_in_segment, unused=2).to(device)
    rows = LoraRows(on_device) if most_in_segment == 1 else LoraRows(on_device, segments, most_in_segment)
    expected = pool.expected(x, slots)

    delta = lora_delta(x, pool.weights, rows, pool.site)
    assert (delta.double().cpu() - expected).norm() <= TOLERANCE[dtype] * expected.norm().clamp(min=1e-9)

    base = torch.randn(len(slots), sum(widths), generator=torch.Generator().manual_seed(2)).to(dtype).to(device)
    added = lora_delta_add_(base.clone(), x, pool.weights, rows, pool.site)
    total = base.double().cpu() + expected
    assert (added.double().cpu() - total).norm() <= TOLERANCE[dtype] * total.norm()
    without = [row for row, slot in enumerate(slots) if slot in (-1, 4)]
    assert torch.equal(added[without], base[without])
