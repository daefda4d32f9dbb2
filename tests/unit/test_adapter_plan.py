"""What config and header come to is decided once for adapters that share them, and weights land where it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from adapter_folders import TARGETS, config, weights, write
from loramux_worker.adapters import placement
from loramux_worker.adapters.adapter_plan import AdapterLimits, AdapterPlans
from loramux_worker.adapters.invalid import AdapterInvalid
from loramux_worker.adapters.peft_format import AdapterFiles, read_adapter

NAMES = ["embed_tokens", "q_proj", "k_proj", "v_proj", "lm_head"]
LIMITS = AdapterLimits(max_rank=64, dtype=torch.float32)


def saved(
    folder: Path, *, rank: int = 3, seed: int = 0, alpha: float = 6.0, dtype: torch.dtype = torch.float32
) -> Path:
    tensors = {name: tensor.to(dtype) for name, tensor in weights(TARGETS, rank, NAMES, seed=seed).items()}
    return write(folder, config(rank, NAMES) | {"lora_alpha": alpha}, tensors)


def test_adapters_that_differ_in_their_values_alone_share_a_plan(tmp_path: Path) -> None:
    plans = AdapterPlans(TARGETS, LIMITS)
    layouts = []
    for i in range(2):
        with AdapterFiles(saved(tmp_path / str(i), seed=i), plans) as files:
            layouts.append(files.layout)
    assert layouts[0] is layouts[1]


@pytest.mark.parametrize("other", [{"rank": 4}, {"alpha": 7}, {"dtype": torch.bfloat16}])
def test_any_other_difference_makes_another_plan(tmp_path: Path, other: dict[str, Any]) -> None:
    plans = AdapterPlans(TARGETS, LIMITS)
    with (
        AdapterFiles(saved(tmp_path / "one"), plans) as one,
        AdapterFiles(saved(tmp_path / "two", **other), plans) as two,
    ):
        assert one.layout is not two.layout
        assert (one.scalings != two.scalings) == ("dtype" not in other)


def test_a_large_header_is_not_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loramux_worker.adapters.adapter_plan._MOST_REMEMBERED_BYTES", 100)
    plans, folder = AdapterPlans(TARGETS, LIMITS), saved(tmp_path)
    with AdapterFiles(folder, plans) as one, AdapterFiles(folder, plans) as two:
        assert one.layout is not two.layout


def test_a_wrong_adapter_is_refused_each_time(tmp_path: Path) -> None:
    plans = AdapterPlans(TARGETS, AdapterLimits(max_rank=2, dtype=torch.float32))
    for _ in range(2):
        with pytest.raises(AdapterInvalid, match="above the limit"):
            AdapterFiles(saved(tmp_path), plans)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("served", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("alpha", [3, 6, 7])  # scaled by 1, by a power of two, by neither
def test_weights_land_as_torch_would_have_them(
    tmp_path: Path, dtype: torch.dtype, served: torch.dtype, alpha: float
) -> None:
    folder = saved(tmp_path, dtype=dtype, alpha=alpha)
    tensors = weights(TARGETS, 3, NAMES, 0, dtype)
    adapter = read_adapter(folder, TARGETS, AdapterLimits(64, served))
    assert 2 * len(adapter.modules) == len(tensors)
    for module in adapter.modules:
        a, b = (tensors[name] for name in sorted(tensors) if f"{TARGETS[module.target].name}." in name)
        assert torch.equal(module.a, a.to(served))
        assert torch.equal(module.b, (b.float() * (alpha / 3)).to(served).t())


@pytest.mark.parametrize(("most_bytes", "most_reads"), [(1, 512), (100, 512), (400, 2), (1 << 20, 3)])
def test_pieces_of_any_size_read_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most_bytes: int, most_reads: int
) -> None:
    folder = saved(tmp_path, dtype=torch.bfloat16)
    expected = read_adapter(folder, TARGETS, LIMITS)
    monkeypatch.setattr(placement, "_MOST_BYTES", most_bytes)
    monkeypatch.setattr(placement, "_MOST_READS", most_reads)
    actual = read_adapter(folder, TARGETS, LIMITS)
    for left, right in zip(expected.modules, actual.modules, strict=True):
        assert torch.equal(left.a, right.a)
        assert torch.equal(left.b, right.b)
