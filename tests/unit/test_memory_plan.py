"""How an engine divides its memory."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from loramux_worker.engine.build import assemble
from loramux_worker.engine.config import EngineConfig
from loramux_worker.engine.memory import plan_memory, step_memory
from loramux_worker.errors import ConfigurationError
from loramux_worker.model.loader import ServedModel, load_model
from tiny_models import make_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    folder: Path = tmp_path_factory.mktemp("model")
    return load_model(str(make_model(folder, "llama", num_adapters=0).path), "cpu", "float32")


def test_a_step_is_given_room_for_its_logits_and_for_a_layer(model: ServedModel) -> None:
    config = EngineConfig(model="tiny", max_batch_sequences=64, max_batched_tokens=512)
    fewer_rows = replace(config, max_batch_sequences=32)
    logits = 4 * 32 * model.vocab_size
    assert step_memory(config, model) - step_memory(fewer_rows, model) >= 3 * logits
    layer = sum(t.out_features for t in model.targets if ".layers.0." in t.name) * model.dtype.itemsize
    longer = replace(config, max_batched_tokens=1024)
    assert step_memory(longer, model) - step_memory(config, model) >= 512 * layer


def test_a_step_has_as_many_tokens_as_the_device_computes_in_some_milliseconds(model: ServedModel) -> None:
    assert EngineConfig(model="tiny").step_tokens("cuda") == 2048
    few = EngineConfig(model="tiny", max_batch_sequences=64)
    limits = assemble(few, model, [].append).scheduler.config
    assert limits.max_batched_tokens == 64 + 192, "on a CPU: a token of every sequence, and 192 of prompts"
    asked = EngineConfig(model="tiny", max_batched_tokens=512)
    assert asked.step_tokens("cuda") == asked.step_tokens("cpu") == 512


def test_a_cache_that_holds_no_sequence_is_refused(model: ServedModel) -> None:
    config = EngineConfig(model="tiny", kv_cache_memory=4 * 16 * model.kv_bytes_per_token)
    assert plan_memory(config, model, 64).num_blocks == 4
    with pytest.raises(ConfigurationError, match=r"--kv-cache-memory: 4 blocks of 16 tokens do not hold"):
        plan_memory(config, model, 65)
