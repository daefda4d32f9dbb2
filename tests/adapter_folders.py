"""Adapter folders written by hand, for models that exist only as a list of target modules."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from loramux_worker.adapters.targets import TargetKind, TargetModule
from loramux_worker.engine.protocol import AdapterReference

PREFIX = "base_model.model."


def linear(name: str, in_features: int, out_features: int) -> TargetModule:
    return TargetModule(name, TargetKind.LINEAR, in_features, out_features)


TARGETS = (
    TargetModule("model.embed_tokens", TargetKind.EMBEDDING, 20, 12),
    *(
        linear(f"model.layers.{layer}.self_attn.{name}", 12, out)
        for layer in range(2)
        for name, out in (("q_proj", 12), ("k_proj", 6), ("v_proj", 6), ("o_proj", 12))
    ),
    linear("lm_head", 12, 20),
)


def config(rank: int, modules: Sequence[str], **fields: Any) -> dict[str, Any]:
    """An `adapter_config.json` with what PEFT always writes, and `fields`."""
    base = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none", "task_type": "CAUSAL_LM"}
    return {**base, "target_modules": list(modules), **fields}


def weights(
    targets: Sequence[TargetModule], rank: int, modules: Sequence[str], seed: int, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Random A and B of the targets whose names end with one of `modules`, under PEFT's keys."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for target in targets:
        if not target.name.endswith(tuple(modules)):
            continue
        middle, end = ("lora_", ".weight") if target.kind is TargetKind.LINEAR else ("lora_embedding_", "")
        for part, shape in (("A", (rank, target.in_features)), ("B", (target.out_features, rank))):
            values = torch.randn(shape, generator=generator).to(dtype)
            tensors[f"{PREFIX}{target.name}.{middle}{part}{end}"] = values
    return tensors


def write(folder: Path, fields: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    """Write both files; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def make_adapter(
    parent: Path,
    name: str,
    targets: Sequence[TargetModule] = TARGETS,
    rank: int = 4,
    modules: Sequence[str] = ("q_proj", "v_proj"),
    seed: int = 0,
) -> AdapterReference:
    """An adapter folder below `parent`, and how an engine is told of it."""
    folder = write(parent / name, config(rank, modules), weights(targets, rank, modules, seed))
    return AdapterReference(name, "sha256:" + name, str(folder))
