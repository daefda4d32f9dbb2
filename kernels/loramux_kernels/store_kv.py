"""Write the keys and values of a step's tokens into the paged cache."""

from __future__ import annotations

from torch import Tensor

from loramux_kernels.backend import runs_triton


def store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """cache[slot // block_size, :, slot % block_size] = key, value.

    Args:
        key, value: [tokens, kv_heads, head_dim], any strides of tokens and heads, the last dimension contiguous.
        key_cache, value_cache: [blocks, kv_heads, block_size, head_dim], of one dtype and one layout.
        slot_mapping: int32 [tokens], the slot each token's key and value go to. Where several tokens go to one slot,
            any of them stays.
    """
    if runs_triton(key):
        from loramux_kernels import store_kv_triton

        store_kv_triton.store_kv(key, value, key_cache, value_cache, slot_mapping)
    else:
        reference_store_kv(key, value, key_cache, value_cache, slot_mapping)


def reference_store_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """`store_kv` in torch: it defines the result."""
    block_size = key_cache.shape[2]
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    key_cache[blocks, :, offsets] = key
    value_cache[blocks, :, offsets] = value
