"""The small ops of a decoder layer: norm, rotation, attention of a decode step."""

from __future__ import annotations

import pytest
import torch
from kernel_devices import DEVICES, TOLERANCE, device_cases
from torch import Tensor

from loramux_kernels import (
    AttentionBatch,
    RotaryLayer,
    SplitCounters,
    add_rms_norm,
    decode_attention,
    decode_attention_triton,
    rotate_and_store,
)
from loramux_kernels.add_rms_norm import add_rms_norm_reference
from loramux_kernels.decode_attention import decode_attention_reference, num_splits
from loramux_kernels.rotary import rotate_and_store_reference


def close(actual: Tensor, expected: Tensor) -> bool:
    difference = (actual.double().cpu() - expected.double().cpu()).norm()
    return bool(difference <= TOLERANCE[actual.dtype] * expected.double().norm())


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("hidden", [64, 200])
@pytest.mark.parametrize("pieces", [0, 1, 3])
def test_add_rms_norm(device, dtype, hidden, pieces):
    generator = torch.Generator().manual_seed(4)
    residual = torch.randn(5, hidden, generator=generator).to(dtype).to(device)
    gain = torch.randn(hidden, generator=generator).to(dtype).to(device)
    partials = torch.randn(pieces, 5, hidden, generator=generator).to(device) if pieces else None
    total, out = add_rms_norm(residual, partials, gain, 1e-5)
    expected_total, expected = add_rms_norm_reference(residual, partials, gain, 1e-5)
    assert close(total, expected_total)
    assert close(out, expected)


class Layer:
    """A layer, a batch over its paged cache, and copies of the cache for the reference."""

    def __init__(
        self, heads: int, kv_heads: int, head_dim: int, contexts: list[int], dtype: torch.dtype, device: str,
        *, norm: bool = False, window: int | None = None, pieces: int = 1, block_size: int = 8,
    ) -> None:  # fmt: skip
        generator = torch.Generator().manual_seed(5)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        angles = torch.arange(512)[:, None] * 0.3 ** torch.arange(head_dim // 2)
        self.layer = RotaryLayer(
            heads, kv_heads, head_dim, angles.cos().to(device), angles.sin().to(device),
            query_gain=random(head_dim).to(dtype).to(device) if norm else None,
            key_gain=random(head_dim).to(dtype).to(device) if norm else None,
            eps=1e-6, sliding_window=window, scale=head_dim**-0.5,
        )  # fmt: skip
        rows = len(contexts)
        self.qkv = random(pieces, rows, self.layer.width).to(torch.float32 if pieces > 1 else dtype).to(device)
        most = -(-max(contexts) // block_size)
        blocks = torch.randperm(rows * most, generator=generator).to(torch.int32)
        self.keys = random(rows * most, kv_heads, block_size, head_dim).to(dtype).to(device)
        self.values = random(rows * most, kv_heads, block_size, head_dim).to(dtype).to(device)
        table = blocks.view(rows, most)
        self.positions = torch.tensor(contexts, dtype=torch.int32) - 1
        at = table[torch.arange(rows), self.positions // block_size]
        self.batch = AttentionBatch(
            query_starts=torch.arange(rows + 1, dtype=torch.int32, device=device),
            context_lens=torch.tensor(contexts, dtype=torch.int32, device=device),
            block_tables=table.flip(0).contiguous().to(device),
            table_rows=torch.arange(rows, dtype=torch.int32).flip(0).contiguous().to(device),
            slot_mapping=(at * block_size + self.positions % block_size).to(torch.int32).to(device),
            most_query_tokens=1,
        )
        self.positions = self.positions.to(device)

    def on_cpu(self) -> Layer:
        """The same in float64 on the CPU, with caches of its own."""
        other = object.__new__(Layer)
        other.layer = RotaryLayer(
            *(v.cpu() if isinstance(v, Tensor) else v for v in (getattr(self.layer, f) for f in RotaryLayer.__slots__))
        )
        other.qkv, other.positions = self.qkv.cpu(), self.positions.cpu()
        other.keys, other.values = self.keys.cpu().clone(), self.values.cpu().clone()
        fields = (getattr(self.batch, f) for f in AttentionBatch.__slots__)
        other.batch = AttentionBatch(*(v.cpu() if isinstance(v, Tensor) else v for v in fields))
        return other


CASES = {
    "one of many": (4, 2, 16, [9], {}),
    "grouped": (6, 2, 32, [1, 17, 130, 64, 3], {"pieces": 2}),
    "odd group": (7, 1, 24, [70, 8], {"norm": True}),
    "window": (4, 4, 64, [200, 20, 31, 1], {"window": 30}),
    "window and splits": (8, 1, 64, [300], {"window": 150, "pieces": 3}),
    "splits": (4, 1, 32, [301, 5, 64], {"block_size": 16}),
}


DECODE_CASES = {f"{case}, {splits} splits": (*CASES[case], splits) for case in CASES for splits in (1, 2, 4, 8, 16)}
INTERPRETED = {
    "float32": [
        "one of many, 1 splits",
        "grouped, 1 splits",
        "odd group, 2 splits",
        "window, 1 splits",
        "window and splits, 8 splits",
        "splits, 4 splits",
    ],
    "float16": ["grouped, 2 splits", "odd group, 1 splits"],
}


@pytest.mark.parametrize(("device", "dtype", "case"), device_cases(DECODE_CASES, **INTERPRETED))
def test_decode_attention(device, dtype, case, monkeypatch):
    heads, kv_heads, head_dim, contexts, more, splits = case
    monkeypatch.setattr(decode_attention_triton, "num_splits", lambda num_rows, num_kv_heads: splits)
    mine = Layer(heads, kv_heads, head_dim, contexts, dtype, device, **more)
    reference = mine.on_cpu()
    expected = decode_attention_reference(
        reference.qkv, reference.positions, reference.layer, reference.keys, reference.values, reference.batch
    )
    counters = SplitCounters.make(kv_heads, torch.device(device))
    for _ in range(2):  # the counters are not reset in between
        out = decode_attention(mine.qkv, mine.positions, mine.layer, mine.keys, mine.values, mine.batch, counters)
        assert close(out, expected)
        assert close(mine.keys, reference.keys)
        assert close(mine.values, reference.values)


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
def test_counts_go_on_past_the_largest_integer(device, dtype, monkeypatch):
    splits = 4
    monkeypatch.setattr(decode_attention_triton, "num_splits", lambda num_rows, num_kv_heads: splits)
    mine = Layer(4, 1, 32, [150, 5], dtype, device)
    counters = SplitCounters.make(1, torch.device(device))
    counters.counts[splits].fill_(2**31 - splits)
    outs = []
    for _ in range(3):
        outs.append(
            decode_attention(mine.qkv, mine.positions, mine.layer, mine.keys, mine.values, mine.batch, counters)
        )
        mine.qkv = -mine.qkv  # so that what an earlier run left in memory is not the answer
    assert (counters.counts[splits][:2] < 0).all()
    reference = mine.on_cpu()
    reference.qkv = -reference.qkv
    expected = decode_attention_reference(
        reference.qkv, reference.positions, reference.layer, reference.keys, reference.values, reference.batch
    )
    assert close(outs[2], expected)


def test_few_sequences_are_split() -> None:
    assert num_splits(1, 8) == 16
    assert num_splits(8, 8) == 4
    assert num_splits(64, 8) == 1
    counters = SplitCounters.make(8, torch.device("cpu")).counts
    for rows in range(1, 300):
        splits = num_splits(rows, 8)
        assert splits == 1 or counters[splits].numel() >= rows * 8


@pytest.mark.parametrize(("device", "dtype"), DEVICES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_rotate_and_store(device, dtype, case):
    heads, kv_heads, head_dim, contexts, more = case
    mine = Layer(heads, kv_heads, head_dim, contexts, dtype, device, **more)
    reference = mine.on_cpu()
    arguments = [(m.qkv, m.positions, m.layer, m.keys, m.values, m.batch.slot_mapping) for m in (mine, reference)]
    assert close(rotate_and_store(*arguments[0]), rotate_and_store_reference(*arguments[1]))
    assert close(mine.keys, reference.keys)
    assert close(mine.values, reference.values)
