"""Attention by padded groups on a CPU, against the reference over a poisoned cache."""

from __future__ import annotations

import pytest
import torch
from test_paged_attention import Paged

from loramux_kernels import paged_attention
from loramux_kernels.padded_attention import CacheRows, PaddedAttention

BATCHES = {
    "one": ([1], [1]),
    "decode": ([7, 33, 16, 64], [1, 1, 1, 1]),
    "decode over long and short contexts": ([7, 300, 65, 64], [1, 1, 1, 1]),
    "one prompt": ([19], [19]),
    "prompts of about one length": ([19, 16, 17], [16, 16, 12]),
    "many scores": ([260], [200]),
    "mixed": ([40, 3, 17, 270, 17, 9], [5, 3, 1, 150, 17, 1]),
    "sequences without a token": ([40, 3, 17], [1, 0, 4]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size"), [(4, 4, 8, 4), (6, 2, 24, 16), (5, 1, 64, 1)])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("batch", BATCHES)
def test_matches_the_reference(batch, window, heads, kv_heads, dim, block_size, dtype):
    contexts, lengths = BATCHES[batch]
    paged = Paged(contexts, lengths, heads=heads, kv_heads=kv_heads, dim=dim, block_size=block_size, dtype=dtype)
    query, keys, values, layout = paged.on("cpu")
    attention = PaddedAttention(layout, CacheRows(keys))
    out = attention(query, keys, values, scale=dim**-0.5, sliding_window=window)
    assert out.shape == (len(query), heads * dim)
    expected = paged_attention(query, keys, values, layout, scale=dim**-0.5, sliding_window=window)
    assert (out.view_as(query) - expected).norm() <= TOLERANCE[dtype] * expected.norm()


TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def test_layers_may_differ_in_their_window():
    paged = Paged([40, 9], [1, 4], heads=4, kv_heads=2, dim=8, block_size=4, dtype=torch.float32)
    query, keys, values, layout = paged.on("cpu")
    attention = PaddedAttention(layout, CacheRows(keys))
    for window in (None, 5, None, 3):
        out = attention(query, keys, values, scale=0.3, sliding_window=window)
        expected = paged_attention(query, keys, values, layout, scale=0.3, sliding_window=window)
        torch.testing.assert_close(out.view_as(query), expected, rtol=1e-5, atol=1e-6)
