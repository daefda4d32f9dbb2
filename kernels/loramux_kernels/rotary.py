"""From the packed projections of a layer to rotated queries and stored keys and values.

    q, k = norm(q), norm(k)                       where the model normalises its heads (Qwen 3)
    q', k' = rotate(q, position), rotate(k, position)
    cache[slot] = k', v

Rotation of the halves of a head, as Hugging Face's models do it: [a, b] → [a·cos - b·sin, b·cos + a·sin]. Su et al.,
"RoFormer: Enhanced Transformer with Rotary Position Embedding", 2021.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RotaryLayer:
    """What a layer does to its heads before they attend."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    cos: Tensor  # float32 [positions, head_dim / 2]
    sin: Tensor
    query_gain: Tensor | None = None  # [head_dim], of the norm on each query head
    key_gain: Tensor | None = None
    eps: float = 0.0
    sliding_window: int | None = None
    scale: float = 1.0  # on the scores of attention

    @property
    def width(self) -> int:
        """Columns of the packed projections: queries, keys, values."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


def rotate_and_store_reference(
    qkv: Tensor,
    positions: Tensor,
    layer: RotaryLayer,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """In torch, in the shape of `rotate_and_store`."""
    summed = qkv.float().sum(0).unflatten(-1, (-1, layer.head_dim))  # [rows, heads of all kinds, head_dim]
    q, k, v = summed.split([layer.num_heads, layer.num_kv_heads, layer.num_kv_heads], dim=1)
    q, k = _normed(q, layer.query_gain, layer.eps), _normed(k, layer.key_gain, layer.eps)
    cos, sin = layer.cos[positions.long()][:, None], layer.sin[positions.long()][:, None]
    block_size = key_cache.shape[2]
    blocks, offsets = slot_mapping.long() // block_size, slot_mapping.long() % block_size
    key_cache[blocks, :, offsets] = _rotated(k, cos, sin).to(key_cache.dtype)
    value_cache[blocks, :, offsets] = v.to(value_cache.dtype)
    return _rotated(q, cos, sin).to(key_cache.dtype)


def _normed(heads: Tensor, gain: Tensor | None, eps: float) -> Tensor:
    if gain is None:
        return heads
    return heads * torch.rsqrt(heads.square().mean(-1, keepdim=True) + eps) * gain.float()


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = heads.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rotate_and_store(
    qkv: Tensor,
    positions: Tensor,
    layer: RotaryLayer,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
) -> Tensor:
    """Rotate, and write keys and values into the paged cache.

    Args:
        qkv: [pieces, rows, width] of any float dtype: the packed projections, pieces still to be added up.
        positions, slot_mapping: int32 [rows].
        key_cache, value_cache: [blocks, kv_heads, block_size, head_dim].

    Returns:
        queries [rows, heads, head_dim] in the dtype of the cache.
    """
    from loramux_kernels import rotary_triton

    out = key_cache.new_empty(qkv.shape[1], layer.num_heads, layer.head_dim)
    rotary_triton.launch(qkv, positions, layer, key_cache, value_cache, slot_mapping, out)
    return out
