"""Adapters with one thing wrong each, made from a good one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from tiny_models import TinyModel, save_adapter

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"


def make_bad_adapters(model: TinyModel, *, max_rank: int) -> dict[str, str]:
    """Save them beside the good ones; returns adapter id → the error code that a request for it gets."""
    good = model.adapters / model.adapter_ids[0]

    def copy(name: str) -> Path:
        folder = model.adapters / "bad" / name
        shutil.copytree(good, folder)
        return folder

    def reweight(name: str, change) -> None:
        folder = copy(name)
        weights = load_file(folder / WEIGHTS)
        save_file(change(weights), folder / WEIGHTS)

    folder = copy("truncated")
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[: len(whole) // 2])

    reweight("shapes", lambda w: {k: torch.zeros(v.shape[0] + 1, v.shape[1] + 1) for k, v in w.items()})
    reweight("nan", lambda w: {k: torch.full_like(v, float("nan")) for k, v in w.items()})
    reweight(
        "left-over",
        lambda w: {**w, "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(4, 64)},
    )

    folder = copy("pickle")
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()

    folder = copy("other-base")
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "base_model_name_or_path": "somebody/other-7b"}))

    folder = copy("junk-config")
    (folder / CONFIG).write_text("{")

    save_adapter(model.path, model.adapters / "bad" / "rank", ["q_proj"], rank=max_rank * 2)
    names = [path.name for path in sorted((model.adapters / "bad").iterdir())]
    return {f"bad/{name}": "adapter_invalid" for name in names}
