"""Adapters that are more than LoRA, in batches with plain ones: greedy tokens are Hugging Face PEFT's."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from loramux_worker.adapters.layout import TRAINED_TOKENS, OwnTensor
from loramux_worker.adapters.own_weights import OwnWeights
from loramux_worker.engine.protocol import AdapterReference, SamplingParameters, Submit
from tiny_models import VOCAB_SIZE, TinyModel, make_model, save_adapter, save_trained_adapter
from unit.engine_support import Recorder

_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "dora": {"targets": _ALL, "use_dora": True},
    "dora-some": {"targets": ["q_proj", "down_proj", "lm_head"], "use_dora": True, "use_rslora": True},
    "bias-lora-only": {"targets": ["q_proj", "v_proj"], "bias": "lora_only"},
    "bias-all": {"targets": ["q_proj", "o_proj"], "bias": "all"},
    "dora-bias": {"targets": ["q_proj", "k_proj"], "use_dora": True, "bias": "all"},
    "dora-embedding": {"targets": ["embed_tokens"], "use_dora": True},
    "dora-ends": {"targets": ["embed_tokens", "v_proj", "lm_head"], "use_dora": True},
    "own-norms": {"targets": ["q_proj"], "modules_to_save": ["model.norm", "layernorm"]},
    "own-ends": {"targets": ["v_proj"], "modules_to_save": ["lm_head"]},
    "own-tables": {"targets": ["o_proj"], "modules_to_save": ["embed_tokens", "lm_head"]},
    "tokens": {"targets": ["q_proj"], "trainable_token_indices": [10, 5, 66]},
    "whole-layers": {"targets": ["q_proj"], "modules_to_save": ["mlp"]},
}
CHOICES: dict[str, dict[str, Any]] = {  # plain LoRA, chosen in PEFT's other ways
    "regex": {"targets": r".*layers\.1\..*(q|gate)_proj"},
    "all-linear": {"targets": "all-linear", "use_rslora": True},
    "patterns": {"targets": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 7}, "alpha_pattern": {"0.*q_proj": 3}},
    "some-layers": {"targets": ["v_proj", "up_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "excluded": {"targets": _ALL, "exclude_modules": ["o_proj", "layers.0.mlp.up_proj"]},
}
_CONV1D = ["c_attn", "c_proj", "c_fc"]
GPT2_KINDS: dict[str, dict[str, Any]] = {
    "all-linear": {"targets": "all-linear", "bias": "all"},
    "patterns": {"targets": _CONV1D, "rank_pattern": {"attn.c_proj": 7}, "alpha_pattern": {"c_fc": 3}},
    "dora": {"targets": _CONV1D, "use_dora": True},
    "dora-bias": {"targets": ["c_attn", "lm_head"], "use_dora": True, "bias": "lora_only"},
    "dora-embedding": {"targets": ["wte", "c_fc"], "use_dora": True},
    "tokens": {"targets": ["c_proj"], "trainable_token_indices": [10, 5, 66]},
    "whole-layers": {"targets": ["c_attn"], "modules_to_save": ["mlp", "attn.c_proj", "ln_f"]},
}
NEW_TOKENS = 12


@pytest.fixture(scope="module", params=["qwen2", "llama", "qwen3", "gpt2"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    made = make_model(tmp_path_factory.mktemp("model"), request.param, num_adapters=2)
    kinds = {"gpt2": GPT2_KINDS, "llama": {**KINDS, **CHOICES}}.get(request.param, KINDS)
    for number, (kind, settings) in enumerate(kinds.items()):
        save_trained_adapter(made.path, made.adapters / kind, seed=number, **settings)
    return replace(made, adapter_ids=(*made.adapter_ids, *kinds))


def expected_tokens(model: TinyModel, adapter_id: str | None, prompt: list[int]) -> list[int]:
    """PEFT's, each adapter on a base model of its own: biases are trained in place."""
    ids = () if adapter_id is None else (adapter_id,)
    return replace(model, adapter_ids=ids).reference().generate(prompt, adapter_id, NEW_TOKENS)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_tokens_equal_peft(model: TinyModel, device: str) -> None:
    adapters = [None, *model.adapter_ids]
    submissions = []
    for number, adapter_id in enumerate([*adapters, *adapters]):
        prompt = [3 + (7 * i * (number + 1)) % 250 for i in range(5 + number)]
        reference = None if adapter_id is None else AdapterReference(adapter_id, "r", str(model.adapters / adapter_id))
        submissions.append(Submit(number, prompt, SamplingParameters(NEW_TOKENS, eos_token_ids=(257,)), reference))
    recorder = Recorder(model, device, max_batched_tokens=48, max_model_len=128)
    recorder.run(submissions)
    assert not recorder.failures
    answers = set()
    for s in submissions:
        adapter_id = None if s.adapter is None else s.adapter.adapter_id
        expected = expected_tokens(model, adapter_id, s.prompt_token_ids)
        assert recorder.tokens[s.sequence_id] == expected, f"sequence {s.sequence_id} with {adapter_id}"
        answers.add(tuple(expected))
    assert len(answers) > len(adapters), "adapters change the answer"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gemma2"])  # the second ties the head, the third scales
def test_logits_of_a_dora_on_the_embedding_are_pefts(architecture: str, device: str, tmp_path: Path) -> None:
    made = make_model(tmp_path, architecture, num_adapters=1)
    save_trained_adapter(made.path, made.adapters / "dora", ["embed_tokens"], use_dora=True)
    adapters = [None, made.adapter_ids[0], "dora", None, "dora"]
    prompts = [[3 + (11 * i * (number + 1)) % 250 for i in range(9 + number)] for number in range(len(adapters))]
    recorder = Recorder(made, device)
    sampling = SamplingParameters(1, logprobs=VOCAB_SIZE)
    references = [a and AdapterReference(a, "r", str(made.adapters / a)) for a in adapters]
    recorder.run([Submit(number, prompts[number], sampling, each) for number, each in enumerate(references)])
    for number, (adapter_id, prompt) in enumerate(zip(adapters, prompts, strict=True)):
        reference = replace(made, adapter_ids=() if adapter_id is None else (adapter_id,)).reference()
        [said] = recorder.logprobs[number]
        assert said is not None
        ours = torch.tensor([logprob for _, logprob in sorted(said.top)])
        torch.testing.assert_close(ours, reference.logprobs(prompt), rtol=1e-4, atol=1e-4)


def test_what_a_dora_lacks_is_named(model: TinyModel, tmp_path: Path) -> None:
    save_adapter(model.path, tmp_path / "plain", ["q_proj", "c_attn"], rank=2)
    config = tmp_path / "plain" / "adapter_config.json"
    config.write_text(config.read_text().replace('"use_dora": false', '"use_dora": true'))
    recorder = Recorder(model, "cpu")
    recorder.run([Submit(1, [5, 6], SamplingParameters(2), AdapterReference("plain", "r", str(tmp_path / "plain")))])
    assert "lora_magnitude_vector of" in recorder.failures[1].message


def test_what_lies_along_an_unknown_axis_is_refused(tmp_path: Path) -> None:
    made = make_model(tmp_path, "qwen3", num_adapters=0)
    save_trained_adapter(made.path, tmp_path / "own", ["q_proj"], modules_to_save=["q_norm"])
    recorder = Recorder(made, "cpu")
    recorder.run([Submit(1, [5, 6], SamplingParameters(2), AdapterReference("own", "r", str(tmp_path / "own")))])
    assert recorder.failures[1].code == "adapter_invalid"
    assert "its own 'model.layers.0.self_attn.q_norm.weight'" in recorder.failures[1].message


@pytest.mark.parametrize("settings", [{"targets": ["wpe"]}, {"targets": ["c_attn"], "modules_to_save": ["wpe"]}])
def test_learnt_positions_of_its_own_are_refused(tmp_path: Path, settings: dict[str, Any]) -> None:
    made = make_model(tmp_path, "gpt2", num_adapters=0)
    save_trained_adapter(made.path, tmp_path / "own", **settings)
    recorder = Recorder(made, "cpu")
    recorder.run([Submit(1, [5, 6], SamplingParameters(2), AdapterReference("own", "r", str(tmp_path / "own")))])
    assert recorder.failures[1].code == "adapter_invalid"
    assert "transformer.wpe" in recorder.failures[1].message


def test_trained_tokens_of_equal_and_missing_ids() -> None:
    tensors = (OwnTensor("e", TRAINED_TOKENS, (3, 2), (7, 0, 4)),)
    run = torch.tensor([7.0, 7, 0.5, 0.5, 4, 4])
    trained = OwnWeights(tensors, run, {}).trained_tokens("e")
    assert trained is not None
    found = trained.look_up(torch.tensor([4, 1, 7, 0, 9, 4]), torch.full((6, 2), -1.0))
    assert found[:, 0].tolist() == [4, -1, 7, 0.5, -1, 4]
