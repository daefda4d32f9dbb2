"""The batched LoRA of a step against one row at a time."""

from __future__ import annotations

import pytest
import torch

from loramux_kernels import LoraTile, lora_add_


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "runs",
    [
        [],
        [(0, 1, 4)],
        [(0, 3, 1), (3, 4, 16), (6, 10, 7)],
        [(2, 10, 64)],
        [(i, i + 1, i + 1) for i in range(10)],
    ],
)
@pytest.mark.parametrize(("inner", "outer"), [(8, 8), (33, 17), (64, 5)])
def test_each_run_gets_its_own_adapter(dtype, runs, inner, outer):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(10, inner, generator=g).to(dtype)
    base = torch.randn(10, outer, generator=g).to(dtype)
    tiles = [
        LoraTile(
            start,
            end,
            torch.randn(r, inner, generator=g).to(dtype),
            torch.randn(r, outer, generator=g).to(dtype),
        )
        for start, end, r in runs
    ]
    expected = base.double()
    for start, end, a, b in tiles:
        for row in range(start, end):
            expected[row] += (a.double() @ x[row].double()) @ b.double()
    out = lora_add_(base.clone(), x, tiles)
    assert (out.double() - expected).norm() / expected.norm() < (1e-6 if dtype == torch.float32 else 2e-2)
    covered = {row for start, end, _ in runs for row in range(start, end)}
    for row in set(range(10)) - covered:
        assert torch.equal(out[row], base[row])


def test_adds_in_place():
    out = torch.zeros(2, 3)
    assert lora_add_(out, torch.ones(2, 3), [LoraTile(0, 2, torch.ones(1, 3), torch.ones(1, 3))]) is out
    assert torch.equal(out, torch.full((2, 3), 3.0))
