"""Storing keys and values: into their slots, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from kernel_devices import DEVICES

from loramux_kernels import store_kv


def rows(cache):
    """[blocks, kv_heads, block_size, head_dim] → [slots, kv_heads, head_dim]."""
    return cache.transpose(1, 2).flatten(0, 1)


def check(store, key, value, *, blocks, block_size, slots):
    """Distinct slots hold what they were given; the others are as they were."""
    _, heads, dim = key.shape
    cache = torch.randn(2, blocks, heads, block_size, dim, device=key.device).to(key.dtype)
    before = cache.clone()
    store(key, value, cache[0], cache[1], torch.tensor(slots, dtype=torch.int32, device=key.device))
    untouched = [i for i in range(blocks * block_size) if i not in slots]
    for was, now, given in zip(before, cache, (key, value), strict=True):
        assert torch.equal(rows(now)[slots], given)
        assert torch.equal(rows(now)[untouched], rows(was)[untouched])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_store_kv_writes_only_its_slots(dtype):
    key, value = torch.randn(2, 3, 2, 8).to(dtype)
    check(store_kv, key, value, blocks=3, block_size=4, slots=[11, 0, 6])


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize(("heads", "dim", "block_size"), [(1, 16, 4), (2, 24, 16), (8, 128, 16), (3, 80, 8), (5, 7, 1)])
def test_the_kernel_writes_only_its_slots(device, dtype, heads, dim, block_size):
    from loramux_kernels import store_kv_triton

    packed = torch.randn(5, heads * 4, dim, device=device).to(dtype)
    key, value = packed[:, heads : 2 * heads], packed[:, 2 * heads : 3 * heads]
    slots = torch.randperm(5 * block_size)[:5].tolist()
    for k, v in ((key, value), (key.transpose(0, 1).contiguous().transpose(0, 1), value)):
        check(store_kv_triton.store_kv, k, v, blocks=5, block_size=block_size, slots=slots)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_padding_shares_a_spare_slot(device, dtype):
    from loramux_kernels import store_kv_triton

    key, value = torch.ones(2, 4, 2, 16, dtype=dtype, device=device)
    cache = torch.zeros(2, 2, 2, 8, 16, dtype=dtype, device=device)
    slots = torch.tensor([3, 8, 8, 8], dtype=torch.int32, device=device)
    store_kv_triton.store_kv(key, value, cache[0], cache[1], slots)
    for stored in cache:
        assert rows(stored)[[3, 8]].eq(1).all()
        assert stored.sum() == 2 * 2 * 16
