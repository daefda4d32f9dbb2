"""The Triton kernel of `store_kv`: one program a token, keys and values of all its heads at once."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from loramux_kernels.backend import pdl

_STEP_ARGUMENTS = ["key_token", "key_head", "value_token", "value_head"]


@triton.jit(do_not_specialize=_STEP_ARGUMENTS, do_not_specialize_on_alignment=["slot_mapping"])
def _store_kv(
    key, value, key_cache, value_cache, slot_mapping, key_token, key_head, value_token, value_head,
    UNIT: tl.constexpr, HEADS: tl.constexpr, HEADS_PADDED: tl.constexpr, D: tl.constexpr, D_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, CACHE_BLOCK: tl.constexpr, CACHE_HEAD: tl.constexpr, CACHE_ROW: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    heads = tl.arange(0, HEADS_PADDED)[:, None]
    dims = tl.arange(0, D_PADDED)[None, :]
    there = slot // BLOCK_SIZE * CACHE_BLOCK + slot % BLOCK_SIZE * CACHE_ROW + heads * CACHE_HEAD + dims
    # strides come in units of UNIT, so that the compiler knows them divisible and uses wide loads
    of_key = (token * key_token + heads * key_head) * UNIT + dims
    of_value = (token * value_token + heads * value_head) * UNIT + dims
    if PDL:
        gdc_wait()
    # a mask that varies along the contiguous axis makes loads narrow: only where the padding is real
    mask = heads < HEADS if D == D_PADDED else (heads < HEADS) & (dims < D)
    keys = tl.load(key + of_key, mask=mask)
    values = tl.load(value + of_value, mask=mask)
    tl.store(key_cache + there, keys, mask=mask)
    tl.store(value_cache + there, values, mask=mask)


def store_kv(key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor) -> None:
    """Launch the kernel; arguments as of `loramux_kernels.store_kv`."""
    tokens, heads, dim = key.shape
    block_size = key_cache.shape[2]
    assert key.stride(2) == value.stride(2) == key_cache.stride(3) == slot_mapping.stride(0) == 1
    assert key_cache.stride() == value_cache.stride()
    strides = [*key.stride()[:2], *value.stride()[:2]]
    unit = 8 if all(s % 8 == 0 for s in strides) else 1
    elements = triton.next_power_of_2(heads) * triton.next_power_of_2(dim)
    early = pdl(key.device)
    if tokens == 0:
        return
    _store_kv[(tokens,)](
        key, value, key_cache, value_cache, slot_mapping, *(s // unit for s in strides),
        UNIT=unit, HEADS=heads, HEADS_PADDED=triton.next_power_of_2(heads),
        D=dim, D_PADDED=triton.next_power_of_2(dim), BLOCK_SIZE=block_size,
        CACHE_BLOCK=key_cache.stride(0), CACHE_HEAD=key_cache.stride(1), CACHE_ROW=key_cache.stride(2),
        PDL=early, num_warps=min(8, max(1, elements // 256)), launch_pdl=early,
    )  # fmt: skip
