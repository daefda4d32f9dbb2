"""The adapters of a batch by run: beside one output or at siblings, each row gets its own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loramux_kernels import Activation, LoraSite, LoraWeights
from loramux_kernels.linear import gated_linear_reference
from loramux_kernels.lora_plan import plan_rows
from loramux_worker.adapters.tiles import AdapterTiles
from loramux_worker.model.step_lora import AdapterRun, PooledLora, RunsLora

IN, WIDTHS = 16, (24, 8, 8)
ROWS, FIRST = 9, 2  # targets 0 and 1 are of other sites


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 4


def make_runs() -> list[AdapterRun]:
    """Rows 2 to 4 have none; the second adapter touches only the middle sibling, the third only another site."""
    everywhere = [(random(4, IN, seed=t), random(4, w, seed=10 + t)) for t, w in enumerate(WIDTHS)]
    middle = (random(7, IN, seed=20), random(7, WIDTHS[1], seed=21))
    elsewhere = (random(3, IN, seed=30), random(3, 5, seed=31))
    return [
        AdapterRun(0, 2, AdapterTiles([None, None, *everywhere])),
        AdapterRun(4, 7, AdapterTiles([None, None, None, middle, None])),
        AdapterRun(7, 8, AdapterTiles([elsewhere, None, None, None, None])),
    ]


def expected_delta(x: Tensor) -> Tensor:
    """Row by row."""
    out = torch.zeros(ROWS, sum(WIDTHS), dtype=torch.float64)
    for start, end, tiles in make_runs():
        for row in range(start, end):
            pieces = [
                torch.zeros(width, dtype=torch.float64)
                if tile is None
                else (tile[0].double() @ x[row].double()) @ tile[1].double()
                for tile, width in zip(tiles[FIRST:], WIDTHS, strict=True)
            ]
            out[row] = torch.cat(pieces)
    return out


def test_deltas_of_siblings_lie_side_by_side() -> None:
    x = random(ROWS, IN, seed=40)
    delta = RunsLora(make_runs()).delta(x, LoraSite(FIRST, WIDTHS))
    torch.testing.assert_close(delta.double(), expected_delta(x), rtol=1e-5, atol=1e-6)
    assert not delta[[2, 3, 7, 8]].any()


@pytest.mark.parametrize("sibling", range(3))
def test_adding_to_one_output_is_its_part_of_the_delta(sibling: int) -> None:
    x, width = random(ROWS, IN, seed=41), WIDTHS[sibling]
    lora = RunsLora(make_runs())
    out = random(ROWS, width, seed=42)
    total = out + lora.delta(x, LoraSite(FIRST, WIDTHS)).split(list(WIDTHS), dim=1)[sibling]
    lora.add_(out, x, FIRST + sibling)
    torch.testing.assert_close(out, total, rtol=1e-5, atol=1e-6)


def test_tiles_are_those_of_the_runs_that_touch_the_target() -> None:
    lora = RunsLora(make_runs())
    assert [(tile.start, tile.end) for tile in lora.tiles(FIRST + 1)] == [(0, 2), (4, 7)]
    assert [(tile.start, tile.end) for tile in lora.tiles(FIRST)] == [(0, 2)]
    assert lora.tiles(1) == ()


@pytest.mark.skipif(torch.cuda.is_available(), reason="on the CPU the kernel runs in the interpreter alone")
def test_gate_and_up_take_in_their_deltas() -> None:
    x, n = random(ROWS, IN, seed=43), 8
    weight, bias = random(2 * n, IN, seed=44), random(2 * n, seed=45)
    site = LoraSite(FIRST + 1, (n, n))
    lora = RunsLora(make_runs())
    expected = gated_linear_reference(x, weight, Activation.SILU, bias, lora.delta(x, site))
    out = lora.gated_linear(x, weight, bias, site, Activation.SILU)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_gate_and_up_of_many_rows_have_their_adapters_in_them() -> None:
    """A shape whose plain product would come in pieces: what the activation reads is one."""
    rows, inner, n = 70, 2048, 1024
    generator = torch.Generator().manual_seed(7)

    def scaled(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    x, weight, site = scaled(rows, inner), scaled(2 * n, inner), LoraSite(0, (n, n))
    tiles = [(scaled(4, inner), scaled(4, n)) for _ in range(2)]
    elements = torch.cat([tile.flatten() for pair in tiles for tile in pair])
    sizes = [tile.numel() for pair in tiles for tile in pair]
    offsets = torch.tensor([0, *sizes]).cumsum(0)[:4].view(1, 2, 2)
    ranks = torch.full((1, 2), 4, dtype=torch.int32)
    weights = LoraWeights(elements, offsets[..., 0].contiguous(), offsets[..., 1].contiguous(), ranks, max_rank=4)
    lora = PooledLora(weights, plan_rows([-1] * 3 + [0] * 67, [4], 64, torch.device("cpu")))
    out = lora.gated_linear(x, weight, None, site, Activation.SILU)
    runs = RunsLora([AdapterRun(3, rows, AdapterTiles(tiles))])
    gate, up = (x @ weight.t() + runs.delta(x, site)).chunk(2, dim=-1)
    expected = torch.nn.functional.silu(gate) * up
    assert (out - expected).norm() <= 1e-5 * expected.norm()
