"""What `--merge-adapter` costs in accuracy: logits in bf16 against float32, merged and not.

    python tests/benchmarks/bench_merge_error.py [--layers 4] [--hidden 512] [--rank 16] [--strength 0.05,0.3]

A Llama with random weights and two adapters of all its linears, the merged one M and another one X; `strength` is how
large an adapter's share of a weight is, |Bᵀ·A| / |W|. Every way is compared with the same files computed in float32:
|logits − reference| / |reference| over all positions, and how many positions have another greedy token.

The last line of the output is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from gpu_rig import ALL_LINEARS
from machine import describe_machine
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from adapter_folders import config
from loramux_worker.adapters.adapter_plan import AdapterLimits
from loramux_worker.adapters.layout import AdapterLayout
from loramux_worker.adapters.peft_format import read_adapter
from loramux_worker.adapters.tiles import AdapterTiles
from loramux_worker.engine.protocol import AdapterReference
from loramux_worker.logs import configure_logs
from loramux_worker.model.attention import IMPLEMENTATION
from loramux_worker.model.context import StepBatch
from loramux_worker.model.loader import ServedModel, load_model
from loramux_worker.model.merge_in_place import merge_in_place
from loramux_worker.model.step_lora import AdapterRun, RunsLora

PROMPTS, LENGTH = 16, 128
Tiles = list[tuple[Tensor, Tensor] | None]


def main() -> None:
    """Measure each strength and print a table of each."""
    arguments = _arguments()
    configure_logs(level="warning")
    torch.set_grad_enabled(False)
    results = {}
    for strength in arguments.strength:
        with tempfile.TemporaryDirectory(prefix="loramux-merge-") as folder:
            results[str(strength)] = measure(Path(folder), arguments, strength)
    print(json.dumps({"benchmark": "merge_error", "machine": describe_machine(), "strength": results}))


def measure(folder: Path, arguments: argparse.Namespace, strength: float) -> dict[str, Any]:
    """The errors of all ways, by their names."""
    save_model(folder / "model", arguments)
    exact = load_model(str(folder / "model"), "cpu", "float32")
    for seed, name in enumerate("MX"):
        save_adapter(exact, folder / name, arguments.rank, strength, seed)
    ids = torch.randint(exact.vocab_size, (PROMPTS, LENGTH), generator=torch.Generator().manual_seed(1))
    truth = {"base": logits(exact, ids)}
    truth |= {name: logits(exact, ids, tiles(exact, folder / name, limits(exact))) for name in "MX"}

    served = load_model(str(folder / "model"), "cpu", "bfloat16")
    plain = limits(served)
    ways = {"base, as it is": ("base", logits(served, ids))}
    for name, label in (("X", "another adapter, beside the base"), ("M", "the merged one, beside the base")):
        ways[label] = (name, logits(served, ids, tiles(served, folder / name, plain)))
    correction = merge_in_place(served, AdapterReference("M", "r", str(folder / "M")), plain)
    corrected = replace(plain, correction=correction)
    ways["base, corrected"] = ("base", logits(served, ids, tiles_of(served, correction.layout, correction.run)))
    ways["another adapter, corrected"] = ("X", logits(served, ids, tiles(served, folder / "X", corrected)))
    ways["the merged one, merged"] = ("M", logits(served, ids))
    print(f"\nstrength {strength:g}: layers {arguments.layers}, hidden {arguments.hidden}, rank {arguments.rank}")
    found = {}
    for label in sorted(ways, key=lambda label: (ways[label][0] != "base", ways[label][0] != "X")):
        name, values = ways[label]
        error = ((values - truth[name]).norm() / truth[name].norm()).item()
        other = (values.argmax(-1) != truth[name].argmax(-1)).double().mean().item()
        print(f"  {label:34} error {error:.3%}   other greedy token {other:.2%}")
        found[label] = {"error": round(error, 6), "other_greedy_token": round(other, 6)}
    return found


def save_model(folder: Path, arguments: argparse.Namespace) -> None:
    """A random Llama in bf16 whose layers keep the size of what goes through them."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        hidden_size=arguments.hidden,
        intermediate_size=arguments.hidden * 11 // 4,
        num_hidden_layers=arguments.layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        vocab_size=4096,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=1 / math.sqrt(parameter.shape[1]))
    model.to(torch.bfloat16).save_pretrained(folder)


def save_adapter(model: ServedModel, folder: Path, rank: int, strength: float, seed: int) -> None:
    """An adapter of every linear of the layers whose share of each weight has that size."""
    generator = torch.Generator().manual_seed(seed)
    fields = config(rank, ALL_LINEARS)
    scaling = fields["lora_alpha"] / rank
    tensors = {}
    for target in model.targets:
        if not target.name.endswith(ALL_LINEARS):
            continue
        a = torch.randn(rank, target.in_features, generator=generator) / math.sqrt(target.in_features)
        b = torch.randn(target.out_features, rank, generator=generator)
        size = model.module.get_submodule(target.name).weight.norm()
        b *= strength * size / (scaling * (b @ a).norm())
        for part, values in (("A", a), ("B", b)):
            tensors[f"base_model.model.{target.name}.lora_{part}.weight"] = values.contiguous()
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "adapter_model.safetensors")


def limits(model: ServedModel) -> AdapterLimits:
    """Any rank, in the model's dtype."""
    return AdapterLimits(1 << 20, model.dtype)


def tiles(model: ServedModel, folder: Path, wanted: AdapterLimits) -> Tiles:
    """An adapter's tiles by target, corrected if `wanted` says so."""
    found: Tiles = [None] * len(model.targets)
    for module in read_adapter(folder, model.targets, wanted).modules:
        found[module.target] = (module.a, module.b)
    return found


def tiles_of(model: ServedModel, layout: AdapterLayout, run: Tensor) -> Tiles:
    """The tiles of a run."""
    found: Tiles = [None] * len(model.targets)
    for module in layout.modules:
        found[module.target] = (module.a(run), module.b(run))
    return found


def logits(model: ServedModel, ids: Tensor, adapter: Sequence[tuple[Tensor, Tensor] | None] | None = None) -> Tensor:
    """Float32 logits [prompts, length, vocabulary], each prompt alone, through the layers that serve."""
    model.module.set_attn_implementation("eager")  # type: ignore[operator] # no paged cache needed
    rows = []
    for prompt in ids:
        run = [] if adapter is None else [AdapterRun(0, len(prompt), AdapterTiles(adapter))]
        attention: Any = None
        positions = torch.arange(len(prompt))
        model.context.batch = StepBatch(prompt, positions, None, attention, lora=RunsLora(run))
        rows.append(model.module(input_ids=prompt[None], use_cache=False).logits[0].float())
    model.context.batch = None
    model.module.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
    return torch.stack(rows)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--strength", type=lambda text: [float(part) for part in text.split(",")], default=[0.05, 0.3])
    return parser.parse_args()


if __name__ == "__main__":
    main()
