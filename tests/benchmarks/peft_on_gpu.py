"""Hugging Face PEFT on the same shapes, for comparison."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import peft
import torch
from gpu_rig import SHAPES
from transformers import AutoModelForCausalLM, LlamaConfig

_BATCH, _PROMPT, _NEW = 8, 64, 32  # adding an adapter walks the whole model: it takes PEFT a second or two


def peft_figures(shape: str, rank: int, modules: Sequence[str], layers: int | None) -> dict[str, Any]:
    """Milliseconds of one request alone (70 + 10 tokens), and of a step of 8 rows with 8 adapters."""
    settings = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    with torch.device("cuda"):
        model: Any = AutoModelForCausalLM.from_config(LlamaConfig(**settings), dtype=torch.bfloat16)
        config = peft.LoraConfig(r=rank, target_modules=list(modules), init_lora_weights=False, task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, config, adapter_name="adapter-0")
        for i in range(1, _BATCH):
            model.add_adapter(f"adapter-{i}", config)
    model.eval()
    names = [f"adapter-{i}" for i in range(_BATCH)]
    alone = _median_ms(lambda: _generate(model, 1, 70, 10))
    mixed = _median_ms(lambda: _generate(model, _BATCH, _PROMPT, _NEW, adapter_names=names), repeats=2)
    return {"alone_ms": round(alone, 1), f"step_ms_{_BATCH}_distinct": round(mixed / _NEW, 1)}


def _generate(model: Any, rows: int, prompt: int, new: int, **options: Any) -> None:
    ids = torch.randint(1000, (rows, prompt), device="cuda")
    lengths = {"min_new_tokens": new, "max_new_tokens": new}
    mask = torch.ones_like(ids)
    model.generate(input_ids=ids, attention_mask=mask, do_sample=False, pad_token_id=0, **lengths, **options)
    torch.cuda.synchronize()


def _median_ms(run: Callable[[], None], repeats: int = 5) -> float:
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times)
