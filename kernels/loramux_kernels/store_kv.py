"""Write the keys and values of a step's tokens into the paged cache."""

from __future__ import annotations

from torch import Tensor


def store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """cache[slot // block_size, :, slot % block_size] = key, value.

    Args:
        key, value: [tokens, kv_heads, head_dim].
        key_cache, value_cache: [blocks, kv_heads, block_size, head_dim].
        slot_mapping: int64 [tokens], the slot each token's key and value go to.
    """
    block_size = key_cache.shape[2]
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    key_cache[blocks, :, offsets] = key
    value_cache[blocks, :, offsets] = value
