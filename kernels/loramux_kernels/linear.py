"""Linear layers of a step: x · Wᵀ, with what surrounds them folded in.

    linear:        x · Wᵀ + bias + delta                    delta: what the adapters add
    gated_linear:  act(g) ⊙ u      with [g, u] = x · [Wg; Wu]ᵀ + bias + delta

Few rows go through our own kernels, which are bound by the bytes of the weight; many through the vendor's library.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loramux_kernels.backend import shared_memory
from loramux_kernels.gated_activation import Activation, gated_activation, gated_activation_reference
from loramux_kernels.tiles import RowsTile, rows_tile, vector_tile


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None, delta: Tensor | None = None) -> Tensor:
    """In torch, in the shape of `linear`."""
    out = torch.nn.functional.linear(x, weight, bias)
    return (out if delta is None else out + delta)[None]


def gated_linear_reference(
    x: Tensor, weight: Tensor, activation: Activation, bias: Tensor | None = None, delta: Tensor | None = None
) -> Tensor:
    """In torch, in the shape of `gated_linear`."""
    return gated_activation_reference(linear_reference(x, weight, bias, delta)[0], activation)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    delta: Tensor | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """One projection, or siblings packed into one weight.

    Args:
        x: [rows, K], contiguous.
        weight: [N, K]; bias [N].
        delta: [rows, N], may be overwritten. It must come from `lora_delta` of the same `x`, and nothing in between.
        out: [rows, N] in the dtype of `x`, for the result, which is then one piece. Not beside a delta.

    Returns:
        [pieces, rows, N]: one piece in the dtype of `x`, or float32 partial sums for the next kernel to add up.
    """
    from loramux_kernels import linear_triton

    (num_rows, inner), columns = x.shape, weight.shape[0]
    if num_rows == 1 and (vector := vector_tile(columns, inner, gated=False)) is not None:
        whole = x.new_empty(1, columns) if out is None else out
        linear_triton.vector(x, weight, whole, vector, bias, delta, 0)
        return whole[None]
    tile = _rows_tile(x, columns, inner, gated=False)
    if tile is None or (out is not None and tile.split > 1):
        return _library(x, weight, bias, delta, out)[None]
    if out is not None:
        pieces = out[None]
    else:
        dtype = torch.float32 if tile.split > 1 else x.dtype
        pieces = torch.empty(tile.split, num_rows, columns, dtype=dtype, device=x.device)
    linear_triton.rows(x, weight, pieces, tile, bias, delta, 0)
    return pieces


def gated_linear(
    x: Tensor, weight: Tensor, activation: Activation, bias: Tensor | None = None, delta: Tensor | None = None
) -> Tensor:
    """Gate and up projection, packed into one weight, and the activation.

    Args:
        x: [rows, K], contiguous.
        weight: [2n, K], the gate's rows first; bias [2n].
        delta: [rows, 2n], as in `linear`.

    Returns:
        [rows, n] in the dtype of `x`.
    """
    from loramux_kernels import linear_triton

    (num_rows, inner), columns = x.shape, weight.shape[0] // 2
    if num_rows == 1 and (vector := vector_tile(columns, inner, gated=True)) is not None:
        out = x.new_empty(1, columns)
        linear_triton.vector(x, weight, out, vector, bias, delta, int(activation))
        return out
    tile = _rows_tile(x, columns, inner, gated=True)
    if tile is None:
        return gated_activation(_library(x, weight, bias, delta), activation)
    out = x.new_empty(num_rows, columns)
    linear_triton.rows(x, weight, out, tile, bias, delta, int(activation))
    return out


def is_for_library(x: Tensor, columns: int) -> bool:
    """Whether a gated product of `columns` goes through the vendor's library, which leaves both halves in memory."""
    return x.shape[0] > 1 and _rows_tile(x, columns, x.shape[1], gated=True) is None


def _rows_tile(x: Tensor, columns: int, inner: int, *, gated: bool) -> RowsTile | None:
    if x.element_size() == 4 and x.is_cuda:
        return None  # float32 is for tests: the library is the reference's own
    return rows_tile(x.shape[0], columns, inner, gated=gated, shared_memory=shared_memory(x.device))


def _library(x: Tensor, weight: Tensor, bias: Tensor | None, delta: Tensor | None, out: Tensor | None = None) -> Tensor:
    """[rows, N] by the vendor's library, which adds in place where there is a delta."""
    if delta is None:
        if bias is None:
            return torch.mm(x, weight.t(), out=out)
        return torch.addmm(bias, x, weight.t(), out=out)
    assert out is None, "what adapters add is where the result goes"
    delta.addmm_(x, weight.t())
    return delta if bias is None else delta.add_(bias)
