"""A random model of true shape as a folder that a worker serves, and random adapters for it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from gpu_rig import ALL_LINEARS, SHAPES, save_lora
from transformers import AutoModelForCausalLM, LlamaConfig

from tiny_models import save_tokenizer


def save_shape(
    folder: Path, shape: str, adapter_ids: Iterable[str], *, rank: int = 16, device: str, layers: int | None = None
) -> tuple[Path, Path]:
    """Model in bfloat16 with a byte-level tokenizer, adapters on all linears of its layers; both folders."""
    settings = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    config = LlamaConfig(**settings, tie_word_embeddings=False, bos_token_id=256, eos_token_id=257, pad_token_id=257)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    path, adapters = folder / f"random-{shape}", folder / "adapters"
    model.save_pretrained(path)
    save_tokenizer(path, config.vocab_size)
    linears = {
        name: (module.in_features, module.out_features)
        for name, module in model.named_modules()
        if name.rpartition(".")[2] in ALL_LINEARS
    }
    for adapter_id in adapter_ids:
        save_lora(adapters / adapter_id, linears, rank, torch.bfloat16, torch.device(device))
    return path, adapters
