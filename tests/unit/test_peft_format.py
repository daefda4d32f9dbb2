"""Adapters made by the PEFT library are read as PEFT runs them; anything else is refused with a reason."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from adapter_folders import PREFIX, TARGETS, config, linear, weights, write
from loramux_worker.adapters.adapter_plan import AdapterLimits, AdapterPlans
from loramux_worker.adapters.base_weights import BaseWeights
from loramux_worker.adapters.invalid import AdapterInvalid
from loramux_worker.adapters.layout import ALIGNMENT, AdapterLayout
from loramux_worker.adapters.peft_format import AdapterFiles, AdapterWeights, read_adapter
from loramux_worker.adapters.targets import TargetKind, TargetModule

LIMITS = AdapterLimits(max_rank=64, dtype=torch.float32)


def tiny_llama(**fields: Any) -> LlamaForCausalLM:
    shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**shape, **heads, **fields}))


def targets_of(model: nn.Module) -> tuple[TargetModule, ...]:
    targets = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            targets.append(linear(name, module.in_features, module.out_features))
        elif isinstance(module, nn.Embedding):
            shape = (module.num_embeddings, module.embedding_dim)
            targets.append(TargetModule(name, TargetKind.EMBEDDING, *shape))
    return tuple(targets)


def save_with_peft(folder: Path, base: Callable[[], nn.Module] = tiny_llama, **fields: Any) -> Any:
    """Save a PEFT adapter with random A and B; returns what PEFT makes of the saved files.

    That may differ from what was saved: PEFT takes the first pattern that matches, and writes them sorted.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lora = LoraConfig(**{"task_type": "CAUSAL_LM", "init_lora_weights": False, **fields})
        peft.get_peft_model(base(), lora).save_pretrained(folder)
        return peft.PeftModel.from_pretrained(base(), folder)


def peft_deltas(tuned: Any) -> dict[str, Tensor]:
    """By module name what PEFT adds to the weight: [out, in], of an embedding [vocabulary, dim]."""
    return {
        name.removeprefix(PREFIX): module.get_delta_weight("default").detach()
        for name, module in tuned.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


def our_deltas(adapter: AdapterWeights, targets: tuple[TargetModule, ...]) -> dict[str, Tensor]:
    deltas = {}
    for module in adapter.modules:
        target = targets[module.target]
        a, b = module.a.float(), module.b.float()
        assert a.shape == (module.rank, target.in_features)
        assert b.shape == (module.rank, target.out_features)
        assert a.is_contiguous()
        assert b.is_contiguous()
        deltas[target.name] = (a.t() @ b) if target.kind is TargetKind.EMBEDDING else (b.t() @ a)
    return deltas


SERVED: dict[str, dict[str, Any]] = {
    "two modules": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 8},
    "all-linear": {"target_modules": "all-linear", "r": 3, "lora_alpha": 5},
    "regex": {"target_modules": r".*layers\.0\..*(q|gate)_proj", "r": 2},
    "vlm-like regex": {
        "target_modules": r"(?:.*?(?:self_attn|mlp).*?(?:k_proj|down_proj))|(?:\bmodel\.layers\.[\d]{1,}\.mlp\.up_proj)"
    },
    "full names": {"target_modules": ["model.layers.1.mlp.down_proj", "layers.0.self_attn.o_proj"]},
    "lm_head": {"target_modules": ["lm_head", "k_proj"], "r": 5},
    "embed_tokens": {"target_modules": ["embed_tokens", "o_proj"], "r": 6, "lora_alpha": 7},
    "rslora": {"target_modules": ["q_proj", "embed_tokens"], "r": 9, "lora_alpha": 4, "use_rslora": True},
    "rank_pattern": {
        "target_modules": ["q_proj", "k_proj", "up_proj", "lm_head"],
        "r": 4,
        "rank_pattern": {"layers.0.self_attn.q_proj": 7, r"layers\.\d+\.mlp\.up_proj": 2, "^lm_head": 3, "_proj": 8},
    },
    "alpha_pattern": {
        "target_modules": ["q_proj", "k_proj", "v_proj"],
        "r": 4,
        "lora_alpha": 4,
        "use_rslora": True,
        "rank_pattern": {"k_proj": 3},
        "alpha_pattern": {"model.layers.1.self_attn.q_proj": 11, "v.proj": 3, "(k|q)_proj": 5},
    },
    "layers_to_transform": {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]},
    "layers_pattern": {"target_modules": ["up_proj"], "layers_to_transform": 0, "layers_pattern": "layers"},
    "exclude_modules": {"target_modules": ["q_proj", "v_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]},
    "exclude regex": {"target_modules": "all-linear", "exclude_modules": r".*mlp.*"},
    "gaussian": {"target_modules": ["q_proj"], "init_lora_weights": "gaussian"},
    "a flag that PEFT corrects": {"target_modules": ["q_proj", "embed_tokens"], "fan_in_fan_out": True},
}


@pytest.mark.parametrize("fields", SERVED.values(), ids=SERVED)
def test_deltas_are_pefts(tmp_path: Path, fields: dict[str, Any]) -> None:
    tuned = save_with_peft(tmp_path, **fields)
    targets = targets_of(tiny_llama())
    adapter = read_adapter(
        tmp_path, targets, AdapterLimits(64, torch.float32, None, BaseWeights.of_model(tiny_llama()))
    )
    expected, ours = peft_deltas(tuned), our_deltas(adapter, targets)
    assert ours.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(ours[name], delta, rtol=1e-5, atol=1e-6)
    assert [module.target for module in adapter.modules] == sorted(module.target for module in adapter.modules)
    assert adapter.rank == max(module.rank for module in adapter.modules)


@pytest.mark.parametrize("served", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("saved", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_any_float_dtype_is_scaled_in_float32_and_then_cast(
    tmp_path: Path, saved: torch.dtype, served: torch.dtype
) -> None:
    tensors = weights(TARGETS, 3, ["q_proj"], seed=1, dtype=saved)
    write(tmp_path, config(3, ["q_proj"], lora_alpha=7), tensors)
    adapter = read_adapter(tmp_path, TARGETS, AdapterLimits(64, served))
    for module in adapter.modules:
        key = f"{PREFIX}{TARGETS[module.target].name}.lora_"
        b = tensors[key + "B.weight"].float() * (7 / 3)
        assert torch.equal(module.a, tensors[key + "A.weight"].to(served))
        assert torch.equal(module.b, b.to(served).t())


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: key.replace(".weight", ".default.weight"),
        lambda key: key.removeprefix(PREFIX),
        lambda key: key.removeprefix(PREFIX).replace("embedding_A", "embedding_A.default"),
    ],
)
def test_other_forms_of_keys(tmp_path: Path, rename: Callable[[str], str]) -> None:
    names = ["q_proj", "embed_tokens"]
    tensors = weights(TARGETS, 2, names, seed=2)
    usual = read_adapter(write(tmp_path / "usual", config(2, names), tensors), TARGETS, LIMITS)
    renamed = {rename(key): tensor for key, tensor in tensors.items()}
    other = read_adapter(write(tmp_path / "other", config(2, names), renamed), TARGETS, LIMITS)
    for left, right in zip(usual.modules, other.modules, strict=True):
        assert left.target == right.target
        assert torch.equal(left.a, right.a)
        assert torch.equal(left.b, right.b)


def test_layout_is_tight_aligned_and_keeps_siblings_adjacent(tmp_path: Path) -> None:
    names = ["embed_tokens", "q_proj", "k_proj", "v_proj", "lm_head"]
    tensors = weights(TARGETS, 3, names, seed=3)
    with AdapterFiles(write(tmp_path, config(3, names), tensors), AdapterPlans(TARGETS, LIMITS)) as files:
        layout = files.layout
    ends = []
    for offset, size in sorted(
        [(m.a_offset, m.rank * m.in_features) for m in layout.modules]
        + [(m.b_offset, m.rank * m.out_features) for m in layout.modules]
    ):
        assert offset % ALIGNMENT == 0
        assert offset - (ends[-1] if ends else 0) < ALIGNMENT
        ends.append(offset + size)
    assert 0 <= layout.num_elements - ends[-1] < ALIGNMENT
    aligned = AdapterLayout.plan([(i, 4) for i in range(1, 4)], TARGETS)
    q, k, v = aligned.modules
    assert k.a_offset == q.a_offset + 4 * 12
    assert v.a_offset == k.a_offset + 4 * 12
    assert aligned.num_elements == sum(4 * (m.in_features + m.out_features) for m in aligned.modules)


class TestCopiesOfTheBaseModel:
    """PEFT saves embedding and head beside an adapter that targets one of them."""

    def test_equal_in_the_served_dtype(self, tmp_path: Path) -> None:
        save_with_peft(tmp_path, target_modules=["embed_tokens", "lm_head"])
        assert any(".base_layer." in key for key in load_file(tmp_path / "adapter_model.safetensors"))
        served = tiny_llama().to(torch.bfloat16)
        limits = AdapterLimits(64, torch.bfloat16, None, BaseWeights.of_model(served))
        assert len(read_adapter(tmp_path, targets_of(served), limits).modules) == 2

    def test_tied_head(self, tmp_path: Path) -> None:
        save_with_peft(tmp_path, lambda: tiny_llama(tie_word_embeddings=True), target_modules=["lm_head"])
        served = tiny_llama(tie_word_embeddings=True)
        limits = AdapterLimits(64, torch.float32, None, BaseWeights.of_model(served))
        assert len(read_adapter(tmp_path, targets_of(served), limits).modules) == 1

    def test_trained(self, tmp_path: Path) -> None:
        save_with_peft(tmp_path, target_modules=["lm_head"])
        served = tiny_llama()
        with torch.no_grad():
            served.lm_head.weight[3, 3] += 1
        with pytest.raises(AdapterInvalid, match=r"lm_head.weight.*differs from the served model's"):
            read_adapter(
                tmp_path, targets_of(served), AdapterLimits(64, torch.float32, None, BaseWeights.of_model(served))
            )

    def test_resized_vocabulary(self, tmp_path: Path) -> None:
        tensors = weights(TARGETS, 2, ["q_proj"], seed=0)
        tensors[PREFIX + "lm_head.weight"] = torch.randn(21, 12)
        write(tmp_path, config(2, ["q_proj"]), tensors)
        limits = AdapterLimits(64, torch.float32, None, BaseWeights({"lm_head.weight": torch.randn(20, 12)}))
        with pytest.raises(AdapterInvalid, match="resized vocabulary"):
            read_adapter(tmp_path, TARGETS, limits)


@pytest.mark.parametrize(
    ("adapter_base", "served", "refused"),
    [
        ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B", False),
        ("meta-llama/llama-3.1-8b", "unsloth/Llama-3.1-8B", False),
        ("unsloth/Llama-3.1-8B-unsloth-bnb-4bit", "meta-llama/Llama-3.1-8B", False),
        ("meta-llama/Llama-3.1-8B-Instruct", "meta-llama/Llama-3.1-8B", True),
        ("mistralai/Mistral-7B-v0.1", "meta-llama/Llama-3.1-8B", True),
        ("gpt2", "openai-community/gpt2", False),
        ("gpt2", "distilgpt2", True),
        ("/home/somebody/models/my-llama", "meta-llama/Llama-3.1-8B", False),
        ("./out/checkpoint-500", "meta-llama/Llama-3.1-8B", False),
        ("out/checkpoint-500", "meta-llama/Llama-3.1-8B", False),
        ("models/anything", "meta-llama/Llama-3.1-8B", False),
        ("C:\\models\\llama", "meta-llama/Llama-3.1-8B", False),
        ("mistralai/Mistral-7B-v0.1", "/srv/models/llama", False),
        (
            "mistralai/Mistral-7B-v0.1",
            "/home/somebody/hub/models--meta-llama--Llama-3.1-8B/snapshots/" + "a" * 40,
            True,
        ),
        ("meta-llama/Llama-3.1-8B", "/home/somebody/hub/models--meta-llama--Llama-3.1-8B/snapshots/" + "a" * 40, False),
        ("mistralai/Mistral-7B-v0.1", None, False),
        (None, "meta-llama/Llama-3.1-8B", False),
        ("", "meta-llama/Llama-3.1-8B", False),
    ],
)
def test_base_model_name(tmp_path: Path, adapter_base: str | None, served: str | None, refused: bool) -> None:
    fields = config(2, ["q_proj"], base_model_name_or_path=adapter_base)
    write(tmp_path, fields, weights(TARGETS, 2, ["q_proj"], seed=0))
    limits = AdapterLimits(64, torch.float32, base_model_name=served)
    if refused:
        with pytest.raises(AdapterInvalid, match="it was made for the model"):
            read_adapter(tmp_path, TARGETS, limits)
    else:
        read_adapter(tmp_path, TARGETS, limits)
