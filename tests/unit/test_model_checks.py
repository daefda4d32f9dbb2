"""A model that cannot be right is refused at the start, with one line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    LlamaConfig,
    MambaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from loramux_worker.errors import ConfigurationError
from loramux_worker.model.loader import load_model
from loramux_worker.model.self_check import check_model
from loramux_worker.model.torch_decoder import TorchDecoder
from tiny_models import CONFIGS, make_model

SMALL = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2}


def save(config: Any, path: Path, model_class: Any = AutoModelForCausalLM) -> str:
    model = model_class.from_config(config) if model_class is AutoModelForCausalLM else model_class(config)
    model.save_pretrained(path)
    return str(path)


def refusal(path: str) -> str:
    with pytest.raises(ConfigurationError) as refused:
        check_model(load_model(path, "cpu", "float32"))
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_no_attention_at_all(tmp_path: Path) -> None:
    assert "--model" in refusal(save(MambaConfig(**SMALL, state_size=4), tmp_path))


def test_attention_that_takes_no_backend(tmp_path: Path) -> None:
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)
    assert "attention backends" in refusal(save(config, tmp_path))


def test_encoder_decoders(tmp_path: Path) -> None:
    config = T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    assert "encoder-decoder" in refusal(save(config, tmp_path, T5ForConditionalGeneration))


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    assert str(tmp_path) in refusal(str(tmp_path))


def test_dynamic_rope_is_served_up_to_where_it_begins(tmp_path: Path) -> None:
    config = LlamaConfig(
        **SMALL,
        intermediate_size=32,
        num_attention_heads=4,
        max_position_embeddings=128,
        rope_parameters={
            "rope_type": "dynamic",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 128,
        },
    )
    assert load_model(save(config, tmp_path), "cpu", "float32").max_position == 128


def test_a_model_whose_served_path_is_wrong_is_found_out(tmp_path: Path) -> None:
    """The check compares outputs, so it needs no list of architectures: break one and it says so."""
    tiny = make_model(tmp_path, "llama", num_adapters=0)
    model = replace(load_model(str(tiny.path), "cpu", "float32"), fused=None)  # the modelling code serves
    check_model(model)
    broken = model.module.model.layers[1].self_attn
    broken.scaling = broken.scaling * torch.pi
    eager = type(broken).forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if broken.config._attn_implementation == "eager":
            broken.scaling /= torch.pi
        try:
            return eager(broken, *args, **kwargs)
        finally:
            if broken.config._attn_implementation == "eager":
                broken.scaling *= torch.pi

    broken.forward = forward
    with pytest.raises(ConfigurationError, match="off Hugging Face's own"):
        check_model(model)


def test_a_decoder_of_ours_that_is_wrong_is_found_out(tmp_path: Path) -> None:
    tiny = make_model(tmp_path, "llama", num_adapters=0)
    model = load_model(str(tiny.path), "cpu", "float32")
    assert isinstance(model.fused, TorchDecoder)
    layers = model.fused._model.layers
    layers[1] = replace(layers[1], rotary=replace(layers[1].rotary, scale=layers[1].rotary.scale * torch.pi))
    with pytest.raises(ConfigurationError, match="off Hugging Face's own"):
        check_model(model)


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_the_architectures_of_the_readme_pass(tmp_path: Path, architecture: str) -> None:
    tiny = make_model(tmp_path, architecture, num_adapters=0)
    check_model(load_model(str(tiny.path), "cpu", "float32"))
