"""Linear layers of few rows, alone and gated, with biases and with what adapters add."""

from __future__ import annotations

import pytest
import torch
from kernel_devices import DEVICES, TOLERANCE
from torch import Tensor

from loramux_kernels import Activation, gated_activation, gated_linear, linear, linear_triton
from loramux_kernels.gated_activation import gated_activation_reference
from loramux_kernels.linear import gated_linear_reference, linear_reference
from loramux_kernels.tiles import RowsTile, VectorTile, rows_tile, vector_tile

SHAPES = [(1, 96, 256), (5, 100, 128), (16, 64, 384), (33, 200, 256)]  # rows, columns, inner


def tensors(dtype: torch.dtype, device: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [(torch.randn(shape, generator=generator) / shape[-1] ** 0.25).to(dtype).to(device) for shape in shapes]


def close(actual: Tensor, expected: Tensor) -> bool:
    difference = (actual.double() - expected.double()).norm()
    return bool(difference <= TOLERANCE[actual.dtype] * expected.double().norm())


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize(("rows", "columns", "inner"), SHAPES)
@pytest.mark.parametrize("extras", ["plain", "bias", "delta", "both"])
def test_linear(device, dtype, rows, columns, inner, extras):
    x, weight, bias, delta = tensors(dtype, device, (rows, inner), (columns, inner), (columns,), (rows, columns))
    bias = bias if extras in ("bias", "both") else None
    delta = delta if extras in ("delta", "both") else None
    expected = linear_reference(
        x.double(), weight.double(), *(None if t is None else t.double() for t in (bias, delta))
    )
    out = linear(x, weight, bias, delta)
    assert out.shape[1:] == expected.shape[1:]
    assert close(out.double().sum(0).to(dtype), expected[0])


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize(("rows", "columns", "inner"), SHAPES)
@pytest.mark.parametrize("activation", Activation)
def test_gated_linear(device, dtype, rows, columns, inner, activation):
    x, weight, bias, delta = tensors(
        dtype, device, (rows, inner), (2 * columns, inner), (2 * columns,), (rows, 2 * columns)
    )
    expected = gated_linear_reference(x.double(), weight.double(), activation, bias.double(), delta.double())
    assert close(gated_linear(x, weight, activation, bias, delta), expected)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("split", [1, 2])
def test_every_kind_of_tile(device, dtype, swap, split):
    x, weight, bias, delta = tensors(dtype, device, (20, 256), (80, 256), (80,), (20, 80))
    kind = torch.float32 if split > 1 else dtype
    out = torch.full((split, 20, 80), torch.nan, dtype=kind, device=device)
    linear_triton.rows(x, weight, out, RowsTile(32, 64, split, swap, 2, 4), bias, delta, 0)
    expected = linear_reference(x.double(), weight.double(), bias.double(), delta.double())[0]
    assert close(out.double().sum(0).to(dtype), expected)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_a_row_alone(device, dtype):
    x, weight, bias, delta = tensors(dtype, device, (1, 512), (70, 512), (70,), (1, 70))
    out = torch.full((1, 1, 70), torch.nan, dtype=dtype, device=device)
    linear_triton.vector(x, weight, out, VectorTile(4, 128, 4), bias, delta, 0)
    assert close(out[0], linear_reference(x.double(), weight.double(), bias.double(), delta.double())[0])


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("activation", Activation)
def test_gated_activation(device, dtype, activation):
    (x,) = tensors(dtype, device, (3, 2 * 1100))
    assert close(gated_activation(x, activation), gated_activation_reference(x.double(), activation))


def test_tiles_fit_their_product() -> None:
    """Whatever the shape: K divides into the pieces, and the stages into the shared memory."""
    for rows in (1, 2, 16, 17, 64, 100, 128, 129):
        for columns, inner in ((6144, 4096), (4096, 14336), (2560, 2048), (1000, 3584), (77, 48), (64, 50)):
            for gated in (False, True):
                tile = rows_tile(rows, columns, inner, gated=gated, shared_memory=100 << 10)
                if tile is not None:
                    assert inner % (tile.inner * tile.split) == 0
                    assert not (gated and tile.split > 1), "an activation is of the whole sum"
                    assert tile.stages >= 1
                vector = vector_tile(columns, inner, gated=gated)
                assert vector is None or inner % vector.inner == 0
    assert rows_tile(129, 4096, 4096, gated=False, shared_memory=227 << 10) is None
