"""One adapter merged into the base weights: all others, and the base model, answer as PEFT without it."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from loramux_worker.adapters.adapter_plan import AdapterLimits
from loramux_worker.adapters.base_weights import BaseWeights
from loramux_worker.adapters.catalog import AdapterCatalog
from loramux_worker.adapters.disk import DiskTier
from loramux_worker.adapters.invalid import AdapterInvalid
from loramux_worker.adapters.peft_format import read_adapter
from loramux_worker.adapters.store import AdapterStore
from loramux_worker.assembly import engine_configs, lease_merged
from loramux_worker.engine.config import EngineConfig
from loramux_worker.engine.protocol import AdapterReference, SamplingParameters, Submit
from loramux_worker.errors import ConfigurationError
from loramux_worker.model.attention import IMPLEMENTATION
from loramux_worker.model.loader import load_model, prepare_model
from loramux_worker.model.merge_in_place import merge_in_place
from loramux_worker.settings import WorkerSettings
from tiny_models import Reference, TinyModel, make_model, save_adapter, save_trained_adapter
from unit.engine_support import Recorder

NEW_TOKENS = 12
_MLP = ["gate_proj", "up_proj", "down_proj"]
_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", *_MLP]
# of make_model's adapters the second, of rank 8, touches every linear of a layer, the third the head, the fourth the
# embedding: these are merged; the first, of rank 4, has q and v alone
MERGED = {"llama": (1, 2, 3), "qwen2": (1,), "gemma2": (3,), "gpt2": (1,)}
MORE: dict[str, dict[str, Any]] = {  # where other weights than A and B meet the merged modules
    "dora": {"targets": _ALL, "use_dora": True},
    "dora-bias": {"targets": ["q_proj", "k_proj"], "use_dora": True, "bias": "all"},
    "dora-embedding": {"targets": ["embed_tokens", "o_proj"], "use_dora": True},
    "own-head": {"targets": ["v_proj"], "modules_to_save": ["lm_head"]},
    "own-layers": {"targets": ["q_proj"], "modules_to_save": ["mlp", "model.norm"]},
    "tokens": {"targets": ["q_proj"], "trainable_token_indices": [10, 5, 66]},
}
_DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], TinyModel]:
    made: dict[str, TinyModel] = {}

    def make(architecture: str) -> TinyModel:
        if architecture not in made:
            tiny = make_model(tmp_path_factory.mktemp("merged"), architecture)
            if architecture == "llama":
                for number, (name, settings) in enumerate(MORE.items()):
                    save_trained_adapter(tiny.path, tiny.adapters / name, seed=number, **settings)
                tiny = replace(tiny, adapter_ids=(*tiny.adapter_ids, *MORE))
            made[architecture] = tiny
        return made[architecture]

    return make


@pytest.fixture(scope="module")
def llama(models: Callable[[str], TinyModel]) -> TinyModel:
    return models("llama")


def reference_to(tiny: TinyModel, adapter_id: str, revision: str = "sha256:0") -> AdapterReference:
    return AdapterReference(adapter_id, revision, str(tiny.adapters / adapter_id))


def submissions(tiny: TinyModel) -> list[Submit]:
    """Twice the base model and every adapter, side by side."""
    adapters = [None, *(reference_to(tiny, adapter_id) for adapter_id in tiny.adapter_ids)]
    made = []
    for number, adapter in enumerate([*adapters, *adapters]):
        prompt = [3 + (7 * i * (number + 1)) % 250 for i in range(5 + number)]
        made.append(Submit(number, prompt, SamplingParameters(NEW_TOKENS, eos_token_ids=(257,)), adapter))
    return made


@cache
def peft_with(tiny: TinyModel, adapter_id: str | None) -> Reference:
    """Each adapter on a base model of its own: biases are trained in place."""
    return replace(tiny, adapter_ids=() if adapter_id is None else (adapter_id,)).reference()


def expected(tiny: TinyModel, submission: Submit) -> list[int]:
    adapter_id = None if submission.adapter is None else submission.adapter.adapter_id
    return peft_with(tiny, adapter_id).generate(submission.prompt_token_ids, adapter_id, NEW_TOKENS)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("device", _DEVICES)
@pytest.mark.parametrize(("architecture", "merged"), [(a, m) for a, numbers in MERGED.items() for m in numbers])
def test_tokens_equal_peft(models: Callable[[str], TinyModel], architecture: str, merged: int, device: str) -> None:
    tiny = models(architecture)
    merge = reference_to(tiny, tiny.adapter_ids[merged])
    recorder = Recorder(
        tiny, device, merge_adapter=merge, max_batched_tokens=48, max_model_len=128, adapter_memory=700_000
    )
    jobs = submissions(tiny)
    recorder.run(jobs)
    assert not recorder.failures
    if (architecture, merged) == ("llama", 1):
        assert recorder.parts.adapters.pool.evictions_total > 0, "the pool is too small for all of them"
    for job in jobs:
        assert recorder.tokens[job.sequence_id] == expected(tiny, job), job.adapter


def merging(tiny: TinyModel, adapter_id: str, **config: object) -> Recorder:
    return Recorder(tiny, "cpu", merge_adapter=reference_to(tiny, adapter_id), **config)


def test_the_merged_adapter_takes_no_slot_and_counts_for_no_rank(llama: TinyModel) -> None:
    hot, other = llama.adapter_ids[1], llama.adapter_ids[0]
    recorder = merging(llama, hot, max_batch_ranks=100)
    parts = recorder.parts
    assert parts.stats().gpu_adapters == parts.stats().gpu_misses_total == 0
    recorder.run([Submit(1, [5, 6], SamplingParameters(2), reference_to(llama, hot))])
    assert parts.stats().gpu_adapters == parts.adapters.host.misses_total == 0
    recorder.load([reference_to(llama, other)])
    assert parts.adapters.rank((other, "sha256:0")) == 4 + 8
    assert parts.scheduler.config.max_batch_ranks == 100 - 8
    parts.adapters.close()


def test_another_revision_of_the_merged_adapter_is_another_adapter(llama: TinyModel) -> None:
    hot, newer = llama.adapter_ids[1], llama.adapter_ids[0]  # the newer revision has the other's files
    recorder = merging(llama, hot)
    prompt = [5, 6, 7]
    adapters = [reference_to(llama, hot), AdapterReference(hot, "sha256:1", str(llama.adapters / newer)), None]
    recorder.run([Submit(i, prompt, SamplingParameters(NEW_TOKENS), a) for i, a in enumerate(adapters)])
    for i, adapter_id in enumerate((hot, newer, None)):
        wanted = peft_with(llama, adapter_id).generate(prompt, adapter_id, NEW_TOKENS)
        assert recorder.tokens[i][: len(wanted)] == wanted


@pytest.mark.parametrize(
    ("adapter_id", "reason"),
    [
        ("dora", "it is a DoRA"),
        ("own-head", "it brings more than LoRA for lm_head"),
        ("tokens", "it brings more than LoRA for model.embed_tokens"),
        ("nothing", "the adapter's files"),
    ],
)
def test_what_cannot_be_taken_off_again_is_refused(llama: TinyModel, adapter_id: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^--merge-adapter {adapter_id}: .*{reason}") as refusal:
        merging(llama, adapter_id)
    assert "\n" not in str(refusal.value)


def test_tied_weights_are_refused(models: Callable[[str], TinyModel]) -> None:
    tiny = models("qwen2")
    for adapter_id in tiny.adapter_ids[2:]:  # the head, the embedding
        with pytest.raises(ConfigurationError, match="shares between embedding and output head"):
            merging(tiny, adapter_id)


def test_a_pool_without_room_for_the_correction_is_refused(llama: TinyModel) -> None:
    with pytest.raises(ConfigurationError, match=r"^--adapter-memory 4096: .* needs \d+ bytes of it"):
        merging(llama, llama.adapter_ids[1], adapter_memory=4096)


def test_values_beyond_the_dtype_are_refused(llama: TinyModel, tmp_path: Path) -> None:
    save_adapter(llama.path, tmp_path / "huge", ["q_proj"], rank=1)
    config = tmp_path / "huge" / "adapter_config.json"
    fields = json.loads(config.read_text())
    config.write_text(json.dumps({**fields, "lora_alpha": 60_000.0 * 8}))
    served = load_model(str(llama.path), "cpu", "float16")
    with pytest.raises(ConfigurationError, match="too large for float16"):
        merge_in_place(served, AdapterReference("huge", "r", str(tmp_path / "huge")), AdapterLimits(8, torch.float16))


def test_an_adapter_is_read_less_the_merged_one(llama: TinyModel) -> None:
    """Module by module, Bᵀ·A of what is read is that of the adapter minus that of the merged one."""
    plain = AdapterLimits(64, torch.float32)
    served = load_model(str(llama.path), "cpu", "float32")
    before = {t.name: served.module.get_submodule(t.name).weight.clone() for t in served.targets}

    def products(adapter_id: str, limits: AdapterLimits) -> dict[int, torch.Tensor]:
        modules = read_adapter(llama.adapters / adapter_id, served.targets, limits).modules
        return {m.target: m.b.t() @ m.a for m in modules}

    ids = llama.adapter_ids[:4]
    alone = {adapter_id: products(adapter_id, plain) for adapter_id in ids}
    merged = ids[1]
    corrected = replace(plain, correction=merge_in_place(served, reference_to(llama, merged), plain))
    for adapter_id in ids:
        less = products(adapter_id, corrected)
        assert less.keys() == alone[adapter_id].keys() | alone[merged].keys()
        for target, product in less.items():
            wanted = torch.zeros_like(product) + alone[adapter_id].get(target, 0) - alone[merged].get(target, 0)
            torch.testing.assert_close(product, wanted, rtol=1e-5, atol=1e-5)
    for index, target in enumerate(served.targets):
        change = served.module.get_submodule(target.name).weight - before[target.name]
        wanted = torch.zeros_like(change) + alone[merged].get(index, 0)
        torch.testing.assert_close(change, wanted, rtol=1e-5, atol=1e-5)


def test_copies_of_the_base_weights_are_those_before_the_merge(llama: TinyModel, tmp_path: Path) -> None:
    """PEFT saves the head beside an adapter that targets it; here it is the served one no longer."""
    served = load_model(str(llama.path), "cpu", "float32")
    head = served.module.get_submodule("lm_head").weight.clone()
    limits = AdapterLimits(64, torch.float32, base_weights=BaseWeights.of_model(served.module))
    merge_in_place(served, reference_to(llama, llama.adapter_ids[2]), limits)
    merged = served.module.get_submodule("lm_head").weight
    assert not torch.equal(merged, head)
    for name, copy in (("good", head), ("bad", merged)):
        shutil.copytree(llama.adapters / llama.adapter_ids[0], tmp_path / name)
        weights = tmp_path / name / "adapter_model.safetensors"
        save_file({**load_file(weights), "base_model.model.lm_head.weight": copy.clone()}, weights)
    read_adapter(tmp_path / "good", served.targets, limits)
    with pytest.raises(AdapterInvalid, match=r"its own 'lm_head.weight'"):
        read_adapter(tmp_path / "bad", served.targets, limits)


def test_packed_projections_are_merged_in_place(llama: TinyModel) -> None:
    module = AutoModelForCausalLM.from_pretrained(llama.path, dtype=torch.float32, attn_implementation=IMPLEMENTATION)
    served = prepare_model(module, torch.device("cpu"), name="tiny", fused=True)
    assert served.fused is not None
    packed = [served.fused._model.layers[0].qkv.weight, served.fused._model.layers[1].gate_up.weight]
    before = [weight.clone() for weight in packed]
    merge_in_place(served, reference_to(llama, llama.adapter_ids[1]), AdapterLimits(64, torch.float32))
    for weight, old, parent, names in zip(
        packed,
        before,
        (module.model.layers[0].self_attn, module.model.layers[1].mlp),
        (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")),
        strict=True,
    ):
        pieces = torch.cat([getattr(parent, name).weight for name in names])
        assert torch.equal(weight, pieces)
        assert not torch.equal(weight, old)


async def test_the_front_leases_it_and_tells_every_engine(llama: TinyModel, tmp_path: Path) -> None:
    settings = WorkerSettings(
        model=str(llama.path),
        adapter_uri=f"file://{llama.adapters}/{{adapter_id}}",
        merge_adapter=llama.adapter_ids[1],
        disk_cache=tmp_path,
        device="cpu",
        engines=2,
    )
    catalog = AdapterCatalog(
        AdapterStore(str(settings.adapter_uri), timeout=5.0),
        DiskTier(tmp_path, settings.disk_quota),
        revision_ttl=60.0,
        adapter_timeout=5.0,
    )
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(catalog.close)
        merged = await lease_merged(settings, catalog, stack)
        configs = engine_configs(settings, merged)
        assert [config.merge_adapter for config in configs] == [merged, merged]
        assert merged is not None
        assert merged.adapter_id == llama.adapter_ids[1]
        assert msgspec.json.decode(msgspec.json.encode(configs[0]), type=EngineConfig) == configs[0]
        pinned = settings.model_copy(update={"merge_adapter": f"{merged.adapter_id}@{merged.revision}"})
        assert await lease_merged(pinned, catalog, stack) == merged
        missing = settings.model_copy(update={"merge_adapter": "no/such"})
        with pytest.raises(ConfigurationError, match=r"^--merge-adapter no/such: "):
            await lease_merged(missing, catalog, stack)
        assert engine_configs(settings, None)[0].merge_adapter is None


def test_a_name_that_is_none_is_refused(llama: TinyModel) -> None:
    with pytest.raises(ValidationError, match="merge_adapter"):
        WorkerSettings(model=str(llama.path), merge_adapter="../etc")
