"""Input tokens that the step before is still to sample."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from loramux_kernels import pending_tokens_triton
from loramux_kernels.pending_tokens import pending_tokens

DEVICES = [
    *([] if torch.cuda.is_available() else ["cpu"]),
    pytest.param("cuda", marks=pytest.mark.gpu),
]


def inputs(rows: int) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """ids, sources and sampled tokens, and what a plain loop makes of them."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(1000, (rows,), generator=generator, dtype=torch.int32)
    sources = torch.randint(-3, 7, (rows,), generator=generator, dtype=torch.int32).clamp(min=-1)
    sampled = torch.randint(1000, 2000, (7,), generator=generator)
    return ids, sources, sampled, [int(sampled[s] if s >= 0 else i) for i, s in zip(ids, sources, strict=True)]


@pytest.mark.parametrize("rows", [1, 5, 256, 300])
def test_the_reference_takes_the_tokens_of_the_last_step(rows: int) -> None:
    *arguments, expected = inputs(rows)
    out = pending_tokens(*arguments)
    assert out.dtype == torch.int64
    assert out.tolist() == expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [1, 5, 256, 300])
def test_the_kernel_does_what_the_reference_does(device: str, rows: int) -> None:
    ids, sources, sampled, expected = inputs(rows)
    out = torch.full((rows + 1,), -7, device=device)
    pending_tokens_triton.launch(ids.to(device), sources.to(device), sampled.to(device), out[:rows])
    assert out.tolist() == [*expected, -7], "and nothing beyond its rows is written"
