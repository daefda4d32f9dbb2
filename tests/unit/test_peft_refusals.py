"""Whatever is wrong with an adapter's files, it is refused with a reason that names it."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from adapter_folders import PREFIX, TARGETS, config, weights, write
from loramux_schemas import ErrorCode
from loramux_worker.adapters.adapter_plan import AdapterLimits
from loramux_worker.adapters.invalid import AdapterInvalid
from loramux_worker.adapters.peft_format import read_adapter
from loramux_worker.adapters.targets import TargetModule
from loramux_worker.errors import RequestFailed

LIMITS = AdapterLimits(max_rank=64, dtype=torch.float32)
Q0 = PREFIX + "model.layers.0.self_attn.q_proj"
A, B = Q0 + ".lora_A.weight", Q0 + ".lora_B.weight"


def refusal(folder: Path, targets: tuple[TargetModule, ...] = TARGETS, limits: AdapterLimits = LIMITS) -> str:
    with pytest.raises(AdapterInvalid) as caught:
        read_adapter(folder, targets, limits)
    assert caught.value.code is ErrorCode.ADAPTER_INVALID
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 1000
    return caught.value.message


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
    ({"peft_type": None}, "peft_type is None"),
    *(({"peft_type": name}, f"peft_type is '{name}'") for name in ("ADALORA", "VERA", "LOHA", "PROMPT_TUNING")),
    ({"use_dora": True}, "lora_magnitude_vector of .* is missing"),
    ({"modules_to_save": ["score"]}, "modules_to_save names none of this model's: \\['score'\\]"),
    ({"trainable_token_indices": [1, 2]}, "trainable_tokens_delta of 'model.embed_tokens' is missing"),
    ({"trainable_token_indices": {"wte": [1]}}, "another module than the model's embedding"),
    ({"trainable_token_indices": [1, 1]}, "not free of repetitions"),
    ({"trainable_token_indices": [100_000]}, "has 100000, the model"),
    ({"lora_bias": True}, "lora_bias"),
    ({"layer_replication": [[0, 1]]}, "layer_replication"),
    ({"target_parameters": ["experts"]}, "target_parameters"),
    ({"megatron_config": {"a": 1}}, "megatron_config"),
    ({"use_qalora": True}, "use_qalora"),
    ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
    ({"ensure_weight_tying": True}, "ensure_weight_tying"),
    ({"arrow_config": {"top_k": 1}}, "arrow_config"),
    *(({name: {"x": 1}}, name) for name in ("use_bdlora", "kasa_config", "monteclora_config", "velora_config")),
    ({"bias": "some"}, "bias is 'some', not one of none, all, lora_only"),
    ({"bias": 1}, "bias is 1"),
    ({"init_lora_weights": "pissa_niter_16"}, "changes the base model's weights"),
    ({"init_lora_weights": "olora"}, "changes the base model's weights"),
    ({"init_lora_weights": "corda"}, "changes the base model's weights"),
    ({"init_lora_weights": "loftq"}, "changes the base model's weights"),
    ({"init_lora_weights": "lora_ga"}, "changes the base model's weights"),
    ({"some_new_feature": {"x": 1}}, "'some_new_feature' is set, which is not known"),
    ({"r": 0}, "r is 0"),
    ({"r": -1}, "r is -1"),
    ({"r": "4"}, "r is '4'"),
    ({"r": 4.0}, "r is 4.0"),
    ({"r": True}, "r is True"),
    ({"r": None}, "r is None"),
    ({"r": 10**400}, "above the limit"),
    ({"r": 3}, "has shape"),
    ({"lora_alpha": None}, "lora_alpha is None"),
    ({"lora_alpha": "8"}, "lora_alpha is '8'"),
    ({"lora_alpha": False}, "lora_alpha is False"),
    ({"lora_alpha": 10**400}, "lora_alpha"),
    ({"lora_alpha": 1e300}, "NaN or infinite"),
    ({"rank_pattern": {"q_proj": 8}}, "has shape"),
    ({"rank_pattern": {"q_proj": 0}}, "rank_pattern is 0"),
    ({"rank_pattern": {"q_proj": None}}, "rank_pattern is None"),
    ({"rank_pattern": ["q_proj"]}, "rank_pattern is .*not an object"),
    ({"rank_pattern": {"q_(proj": 4}}, "the pattern 'q_\\(proj' is wrong"),
    ({"rank_pattern": {"q_proj": 65}}, "rank 65 .* above the limit of 64"),
    ({"alpha_pattern": {"q_proj": "x"}}, "alpha_pattern is 'x'"),
    ({"alpha_pattern": "x"}, "alpha_pattern is 'x'"),
    ({"use_rslora": 1}, "use_rslora is 1"),
    ({"target_modules": None}, "target_modules is missing"),
    ({"target_modules": []}, "target_modules is missing"),
    ({"target_modules": {}}, "target_modules is {}"),
    ({"target_modules": [1]}, "target_modules is \\[1\\]"),
    ({"target_modules": ["k_proj"]}, "q_proj' are left over: the config does not target it"),
    ({"target_modules": ["q_proj", "k_proj"]}, "k_proj' is a target module of the config and has no weights"),
    ({"target_modules": ["q_proj", "lm_head"]}, "'lm_head' is a target module"),
    ({"target_modules": "all-linear"}, "is a target module of the config and has no weights"),
    ({"target_modules": "(q_proj"}, "the pattern '\\(q_proj' is wrong"),
    ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, "layers_to_transform needs a list"),
    ({"layers_to_transform": [0]}, "layers.1.self_attn.q_proj' are left over"),
    ({"layers_to_transform": "0"}, "layers_to_transform is '0'"),
    ({"layers_to_transform": [True]}, "layers_to_transform"),
    ({"layers_pattern": "layers"}, "layers_pattern needs layers_to_transform"),
    ({"exclude_modules": ["layers.1.self_attn.q_proj"]}, "layers.1.self_attn.q_proj' are left over"),
    ({"exclude_modules": 3}, "exclude_modules is 3"),
    ({"base_model_name_or_path": 3}, "base_model_name_or_path is 3"),
]


@pytest.mark.parametrize(("fields", "reason"), BAD_FIELDS, ids=lambda value: str(value)[:40])
def test_bad_config(tmp_path: Path, fields: dict[str, Any], reason: str) -> None:
    good = config(4, ["q_proj"])
    write(tmp_path, good, weights(TARGETS, 4, ["q_proj"], seed=0))
    read_adapter(tmp_path, TARGETS, LIMITS)
    (tmp_path / "adapter_config.json").write_text(json.dumps({**good, **fields}))
    assert re.search(reason, refusal(tmp_path))


def test_magnitudes_of_the_embedding(tmp_path: Path) -> None:
    tensors, key = weights(TARGETS, 4, ["embed_tokens"], seed=0), "model.embed_tokens.lora_magnitude_vector"
    write(tmp_path, config(4, ["embed_tokens"], use_dora=True), tensors)
    assert refusal(tmp_path) == "lora_magnitude_vector of 'model.embed_tokens' is missing"
    write(tmp_path, config(4, ["embed_tokens"], use_dora=True), {**tensors, PREFIX + key: torch.ones(20)})
    assert "has shape [20], config and model say [12]" in refusal(tmp_path)
    write(tmp_path, config(4, ["embed_tokens"]), {**tensors, PREFIX + key: torch.ones(12)})
    assert "is left over: the config does not ask for it" in refusal(tmp_path)
    write(tmp_path, config(4, ["embed_tokens"], use_dora=True), {**tensors, PREFIX + key: torch.ones(12)})
    assert read_adapter(tmp_path, TARGETS, LIMITS).rank == 4


@pytest.mark.parametrize("field", ["peft_type", "r", "lora_alpha", "target_modules"])
def test_missing_field(tmp_path: Path, field: str) -> None:
    fields = config(4, ["q_proj"])
    del fields[field]
    write(tmp_path, fields, weights(TARGETS, 4, ["q_proj"], seed=0))
    assert field.removeprefix("lora_") in refusal(tmp_path)


def test_what_says_nothing_about_the_result_is_accepted(tmp_path: Path) -> None:
    fields = config(
        4,
        ["q_proj"],
        init_lora_weights="eva",
        eva_config={"rho": 2.0},
        lora_dropout=0.1,
        inference_mode=False,
        revision="main",
        auto_mapping={"parent_library": "x"},
        a_field_of_tomorrow=None,
        another=False,
    )
    write(tmp_path, fields, weights(TARGETS, 4, ["q_proj"], seed=0))
    assert read_adapter(tmp_path, TARGETS, LIMITS).rank == 4


BAD_CONFIG_BYTES: list[tuple[bytes, str]] = [
    (b"", "not valid JSON"),
    (b"{", "not valid JSON"),
    (b"[]", "not a JSON object"),
    (b"null", "not a JSON object"),
    (b"\xff\xfe{}", "not valid JSON"),
    (b'{"r": 1, "r": 2}', "'r' stands there twice"),
    (b'{"r": NaN}', "NaN is not JSON"),
    (b'{"lora_alpha": -Infinity}', "-Infinity is not JSON"),
    (b"[" * 100_000, "not valid JSON"),
    (b'{"a":' * 50_000, "not valid JSON"),
    (b'{"r": ' + b"9" * 5000 + b"}", "not valid JSON"),
    (b" " * (5 << 20), "larger than"),
    (b'{"peft_type": "\\ud800\\n\\u0000"}', r"\\ud800"),
]


@pytest.mark.parametrize(("data", "reason"), BAD_CONFIG_BYTES, ids=range(len(BAD_CONFIG_BYTES)))
def test_config_that_is_no_json_object(tmp_path: Path, data: bytes, reason: str) -> None:
    write(tmp_path, {}, weights(TARGETS, 4, ["q_proj"], seed=0))
    (tmp_path / "adapter_config.json").write_bytes(data)
    assert re.search(reason, refusal(tmp_path))


def with_tensor(key: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.__setitem__(key, tensor)


def without(*keys: str) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: [tensors.pop(key) for key in keys] and None


def poisoned(key: str, value: float) -> Callable[[dict[str, Tensor]], None]:
    def poison(tensors: dict[str, Tensor]) -> None:
        tensors[key][1, 1] = value

    return poison


BAD_TENSORS: list[tuple[Callable[[dict[str, Tensor]], None], str]] = [
    (without(A), "lora_A of .*q_proj' is missing"),
    (without(B), "lora_B of .*q_proj' is missing"),
    (without(A, B), "layers.0.self_attn.q_proj' is a target module .* has no weights"),
    (poisoned(A, math.nan), "lora_A.weight' has NaN or infinite values"),
    (poisoned(B, math.inf), "lora_B.weight' has NaN or infinite values"),
    (with_tensor(A, torch.randn(4, 13)), "has shape '?\\[4, 13\\]"),
    (with_tensor(A, torch.randn(12, 4)), "has shape"),
    (with_tensor(B, torch.randn(4, 12)), "has shape"),
    (with_tensor(A, torch.randn(5, 12)), "has shape"),
    (with_tensor(A, torch.randn(48)), "has shape"),
    (with_tensor(A, torch.tensor(1.0)), "has shape"),
    (with_tensor(A, torch.randn(1, 4, 12)), "has shape"),
    (with_tensor(A, torch.zeros(0, 12)), "has the shape"),
    (with_tensor(A, torch.ones(4, 12, dtype=torch.int8)), "dtype 'I8'"),
    (with_tensor(A, torch.ones(4, 12, dtype=torch.float64)), "dtype 'F64'"),
    (with_tensor(A.replace("lora_A.weight", "lora_A.default.weight"), torch.randn(4, 12)), "is there twice"),
    (with_tensor(A.removeprefix(PREFIX), torch.randn(4, 12)), "is there twice"),
    (
        with_tensor(Q0 + ".lora_magnitude_vector", torch.ones(12)),
        "lora_magnitude_vector of .* is left over: the config does not ask for it",
    ),
    (with_tensor(Q0 + ".bias", torch.ones(12)), "bias' is left over"),
    (with_tensor(Q0 + ".lora_B.bias", torch.ones(12)), "lora_B.bias' is left over"),
    (with_tensor(Q0 + ".lora_A.other.weight", torch.ones(4, 12)), "is left over"),
    (with_tensor(Q0 + ".lora_embedding_A", torch.ones(4, 12)), "of kind linear"),
    (with_tensor(PREFIX + "model.embed_tokens.lora_A.weight", torch.ones(4, 12)), "of kind embedding"),
    (
        with_tensor(PREFIX + "model.layers.9.self_attn.q_proj.lora_A.weight", torch.ones(4, 12)),
        "does not have or adapt",
    ),
    (with_tensor(PREFIX + "model.norm.lora_A.weight", torch.ones(4, 12)), "does not have or adapt"),
    (with_tensor(PREFIX + "lm_head.weight", torch.ones(20, 12)), "lm_head.weight' is left over"),
    (with_tensor(PREFIX + "lm_head.base_layer.weight", torch.ones(20, 12)), "is left over"),
    (with_tensor("", torch.ones(1)), "'' is left over"),
    (with_tensor(".lora_A.weight", torch.ones(4, 12)), "does not have or adapt"),
    (with_tensor("x" * 100_000, torch.ones(1)), "is left over"),
    (with_tensor("\n\x00é" + A, torch.ones(4, 12)), "does not have or adapt"),
    (lambda tensors: tensors.clear(), "is a target module of the config and has no weights"),
]


@pytest.mark.parametrize(("change", "reason"), BAD_TENSORS, ids=range(len(BAD_TENSORS)))
def test_bad_tensors(tmp_path: Path, change: Callable[[dict[str, Tensor]], None], reason: str) -> None:
    tensors = weights(TARGETS, 4, ["q_proj"], seed=0)
    change(tensors)
    write(tmp_path, config(4, ["q_proj"]), tensors)
    assert re.search(reason, refusal(tmp_path))


def test_no_module_of_this_model(tmp_path: Path) -> None:
    write(tmp_path, config(4, ["w1"]), {})
    assert "none of this model's" in refusal(tmp_path)


def test_values_that_the_served_dtype_cannot_hold(tmp_path: Path) -> None:
    tensors = weights(TARGETS, 4, ["q_proj"], seed=0)
    tensors[A][0, 0] = 1e6
    write(tmp_path, config(4, ["q_proj"]), tensors)
    read_adapter(tmp_path, TARGETS, AdapterLimits(64, torch.bfloat16))
    assert "too large for float16" in refusal(tmp_path, limits=AdapterLimits(64, torch.float16))


def test_missing_and_strange_files(tmp_path: Path) -> None:
    tensors = weights(TARGETS, 4, ["q_proj"], seed=0)
    with pytest.raises(RequestFailed) as caught:
        read_adapter(tmp_path / "gone", TARGETS, LIMITS)
    assert caught.value.code is ErrorCode.ADAPTER_UNAVAILABLE
    assert "adapter_config.json is missing" in refusal(tmp_path)
    write(tmp_path, config(4, ["q_proj"]), tensors)
    (tmp_path / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors is missing" in refusal(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"\x80\x02.")
    assert "adapter_model.bin is a pickle" in refusal(tmp_path)
    (tmp_path / "adapter_model.safetensors").mkdir()
    assert "not a regular file" in refusal(tmp_path)
    (tmp_path / "adapter_model.safetensors").rmdir()
    os.mkfifo(tmp_path / "adapter_model.safetensors")
    assert "not a regular file" in refusal(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    os.mkfifo(tmp_path / "adapter_config.json")
    assert "not a regular file" in refusal(tmp_path)
