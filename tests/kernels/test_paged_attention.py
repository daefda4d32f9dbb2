"""Paged attention against a naive loop over each query token."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from kernel_devices import DEVICES, device_cases

from loramux_kernels import AttentionBatch, paged_attention, store_kv

TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def naive(query, keys, values, *, first, scale, window=None, softcap=None):
    """query [n, H, D] at positions first…, keys and values [L, Hkv, D] → [n, H, D] in float64."""
    n, heads, _ = query.shape
    group = heads // keys.shape[1]
    query, keys, values = query.double(), keys.double(), values.double()
    out = torch.empty_like(query)
    for i in range(n):
        position = first + i
        lowest = 0 if window is None else max(0, position - window + 1)
        for h in range(heads):
            k, v = keys[lowest : position + 1, h // group], values[lowest : position + 1, h // group]
            scores = k @ query[i, h] * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            out[i, h] = scores.softmax(0) @ v
    return out


class Paged:
    """Random sequences whose keys and values lie in shuffled blocks of a poisoned cache."""

    def __init__(
        self, contexts, query_lens, *, heads, kv_heads, dim, block_size, dtype, poison=1e4, padding=(0, 0), seed=0
    ):
        """padding: sequences without a token and rows without a sequence at the end of the batch."""
        g = torch.Generator().manual_seed(seed)
        blocks_of = [-(-c // block_size) for c in contexts]
        total = sum(blocks_of) + 2
        order = torch.randperm(total, generator=g).tolist()
        self.key_cache = torch.full((total, kv_heads, block_size, dim), poison, dtype=dtype)
        self.value_cache = self.key_cache.clone()
        no_sequences, no_rows = padding
        rows = torch.randperm(len(contexts) + 2, generator=g)[: len(contexts)]
        tables = torch.zeros(len(contexts) + 2, max(blocks_of) + 1, dtype=torch.int32)
        queries, slots = [], []
        self.sequences = []
        for row, context, n, blocks in zip(rows.tolist(), contexts, query_lens, blocks_of, strict=True):
            table = torch.tensor([order.pop() for _ in range(blocks)])
            tables[row, :blocks] = table
            positions = torch.arange(context)
            where = table[positions // block_size] * block_size + positions % block_size
            keys = torch.randn(context, kv_heads, dim, generator=g).to(dtype)
            values = torch.randn(context, kv_heads, dim, generator=g).to(dtype)
            store_kv(keys, values, self.key_cache, self.value_cache, where)
            queries.append(torch.randn(n, heads, dim, generator=g).to(dtype))
            slots.append(where[context - n :])
            self.sequences.append((keys, values, context - n))
        slots.append(torch.full((no_rows,), order.pop() * block_size))
        queries.append(torch.zeros(no_rows, heads, dim, dtype=dtype))
        self.query = torch.cat(queries)
        ends = torch.tensor([0, *query_lens, *[0] * no_sequences]).cumsum(0)
        self.batch = AttentionBatch(
            query_starts=ends.int(),
            context_lens=torch.tensor([*contexts, *[0] * no_sequences], dtype=torch.int32),
            block_tables=tables,
            table_rows=torch.tensor([*rows.tolist(), *[0] * no_sequences], dtype=torch.int32),
            slot_mapping=torch.cat(slots).int(),
            most_query_tokens=max(query_lens),
        )

    def on(self, device):
        """The arguments of the op, on that device."""
        fields = {f.name: getattr(self.batch, f.name) for f in dataclasses.fields(self.batch)}
        batch = AttentionBatch(**{k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in fields.items()})
        return self.query.to(device), self.key_cache.to(device), self.value_cache.to(device), batch

    def check(self, out, dtype, **how):
        """Every sequence's rows against the loop."""
        assert out.shape == self.query.shape
        assert out.dtype == dtype
        starts = self.batch.query_starts.tolist()
        for i, (keys, values, first) in enumerate(self.sequences):
            here = slice(starts[i], starts[i + 1])
            expected = naive(self.query[here], keys, values, first=first, **how)
            error = (out[here].cpu().double() - expected).norm() / expected.norm()
            assert error < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "block_size"), [(4, 4, 8, 4), (6, 2, 24, 16), (5, 1, 64, 1)])
@pytest.mark.parametrize(
    ("contexts", "query_lens"),
    [([1], [1]), ([7, 33, 16], [1, 1, 1]), ([19], [19]), ([40, 3, 17, 17], [5, 3, 1, 17]), ([9, 9], [1, 8])],
)
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (5, None), (None, 3.0), (8, 2.0)])
def test_matches_the_naive_loop(dtype, heads, kv_heads, dim, block_size, contexts, query_lens, window, softcap):
    paged = Paged(contexts, query_lens, heads=heads, kv_heads=kv_heads, dim=dim, block_size=block_size, dtype=dtype)
    scale = 1 / math.sqrt(dim)
    out = paged_attention(*paged.on("cpu"), scale=scale, sliding_window=window, softcap=softcap)
    paged.check(out, dtype, scale=scale, window=window, softcap=softcap)


@pytest.mark.parametrize("padding", [(3, 0), (0, 5), (2, 4)])
@pytest.mark.parametrize("query_lens", [[1, 1, 1], [1, 6, 1]])
def test_padding_is_left_alone(padding, query_lens):
    shape = {"heads": 4, "kv_heads": 2, "dim": 16, "block_size": 4, "dtype": torch.float32}
    paged = Paged([9, 14, 1], query_lens, padding=padding, **shape)
    out = torch.full_like(paged.query, 7.0)
    assert paged_attention(*paged.on("cpu"), scale=0.25, out=out) is out
    paged.check(out, torch.float32, scale=0.25)
    assert not out[sum(query_lens) :].any()


SHAPES = [(4, 4, 16, 4), (4, 2, 24, 8), (3, 1, 64, 16), (7, 1, 128, 16), (14, 2, 80, 16), (2, 2, 256, 32)]
BATCHES = {
    "decode": ([70, 1, 33, 129], [1, 1, 1, 1]),
    "prefill": ([150], [150]),
    "mixed": ([90, 40, 3, 17, 70], [33, 1, 3, 1, 64]),
}
MASKS = [(None, None), (21, None), (None, 3.0), (50, 2.0)]
CASES = {
    f"{kind}-{'-'.join(map(str, shape))}": (shape, kind, *MASKS[(i + j) % len(MASKS)])
    for i, shape in enumerate(SHAPES)
    for j, kind in enumerate(BATCHES)
}
INTERPRETED = {
    "float32": [name for name in CASES if name not in ("prefill-14-2-80-16", "mixed-14-2-80-16")],
    "float16": ["decode-14-2-80-16", "mixed-4-2-24-8", "prefill-3-1-64-16"],
}
SPLIT_CASES = {f"{splits} splits, window {window}": (splits, window) for splits in (1, 2, 8) for window in (None, 100)}


def on_triton(paged, device, **options):
    """The kernel itself: on a CPU the op would be torch's."""
    from loramux_kernels import paged_attention_triton

    return paged_attention_triton.paged_attention(*paged.on(device), **options)


@pytest.mark.parametrize(("device", "dtype", "case"), device_cases(CASES, **INTERPRETED))
def test_the_kernel_matches_the_naive_loop(device, dtype, case):
    shape, kind, window, softcap = case
    heads, kv_heads, dim, block_size = shape
    shape = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "block_size": block_size, "dtype": dtype}
    # what lies beyond a context may be anything: another sequence's adapter may have overflowed there
    paged = Paged(*BATCHES[kind], padding=(2, 3), poison=math.nan, **shape)
    scale = 1 / math.sqrt(dim)
    out = on_triton(paged, device, scale=scale, sliding_window=window, softcap=softcap)
    paged.check(out, dtype, scale=scale, window=window, softcap=softcap)


@pytest.mark.parametrize(("device", "dtype", "case"), device_cases(SPLIT_CASES, float16=["2 splits, window None"]))
def test_programs_share_a_context(device, dtype, case):
    splits, window = case
    shape = {"heads": 6, "kv_heads": 2, "dim": 80, "block_size": 16, "dtype": dtype}
    paged = Paged([700, 130, 64, 1], [1, 1, 1, 1], padding=(1, 1), poison=math.nan, **shape)
    out = on_triton(paged, device, scale=0.1, sliding_window=window, splits=splits)
    paged.check(out, dtype, scale=0.1, window=window)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("query_lens", [[1, 1], [20, 1]])
def test_the_kernel_takes_any_strides(device, dtype, query_lens):
    paged = Paged([25, 30], query_lens, heads=4, kv_heads=2, dim=16, block_size=8, dtype=dtype)
    query, *rest = paged.on(device)
    tokens = len(query)
    of_a_wider_row = torch.zeros(tokens, 6, 16, dtype=dtype, device=device)
    of_a_wider_row[:, 1:5] = query
    head_by_head = query.transpose(0, 1).contiguous().transpose(0, 1)
    odd = torch.zeros(tokens, 4, 17, dtype=dtype, device=device)
    odd[..., :16] = query
    from loramux_kernels import paged_attention_triton

    for strided in (of_a_wider_row[:, 1:5], head_by_head, odd[..., :16]):
        out = torch.empty(tokens, 4, 16, dtype=dtype, device=device)
        assert paged_attention_triton.paged_attention(strided, *rest, scale=0.25, out=out) is out
        paged.check(out, dtype, scale=0.25)


@pytest.mark.gpu
@pytest.mark.parametrize("query_lens", [[1, 1], [20, 1]])
def test_a_graph_is_replayed_over_other_batches(query_lens):
    shape = {"heads": 8, "kv_heads": 2, "dim": 64, "block_size": 16, "dtype": torch.bfloat16}
    captured, other = (Paged([300, 40], query_lens, padding=(1, 2), seed=seed, **shape) for seed in (0, 1))
    fixed = captured.on("cuda")
    paged_attention(*fixed, scale=0.1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = paged_attention(*fixed, scale=0.1)
    for paged in (other, captured):
        query, key_cache, value_cache, batch = paged.on("cuda")
        for there, here in zip(fixed[:3], (query, key_cache, value_cache), strict=True):
            there.copy_(here)
        for field in dataclasses.fields(batch):
            if isinstance(there := getattr(fixed[3], field.name), torch.Tensor):
                there.copy_(getattr(batch, field.name))
        graph.replay()
        paged.check(out, torch.bfloat16, scale=0.1)
