"""The engine's greedy tokens are Hugging Face PEFT's, whatever shares the batch with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from loramux_worker.engine.protocol import AdapterReference, SamplingParameters, Submit
from tiny_models import CONFIGS, TinyModel, kv_cache_bytes, make_model
from unit.engine_support import Recorder, submissions_for


@pytest.fixture(scope="module", params=list(CONFIGS))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("model"), request.param, num_adapters=6)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


WAYS = [
    *(pytest.param("cpu", depth, False, id=f"cpu-{depth}") for depth in (0, 1)),
    *(
        pytest.param(
            "cuda", depth, graphs, id=f"cuda-{depth}-{'graphs' if graphs else 'kernels'}", marks=pytest.mark.gpu
        )
        for depth in (0, 1)
        for graphs in (False, True)
    ),
]


@pytest.mark.parametrize(("device", "pipeline_depth", "cuda_graphs"), WAYS)
def test_tokens_equal_peft(model: TinyModel, device: str, pipeline_depth: int, cuda_graphs: bool) -> None:
    submissions = submissions_for(model, count=16, most_prompt=200, new_tokens=40, seed=1)
    kv_cache = kv_cache_bytes(model.path, num_blocks=40, block_size=8)
    recorder = Recorder(
        model,
        device,
        pipeline_depth=pipeline_depth,
        cuda_graphs=cuda_graphs,
        max_batched_tokens=48,
        max_model_len=256,
        block_size=8,
        kv_cache_memory=kv_cache,
        adapter_memory=1 << 22,
    )
    recorder.run(submissions)
    assert recorder.parts.engine.preemptions_total > 0, "the pool is small enough to force preemption"
    assert recorder.has_replayed_graphs == cuda_graphs
    reference = model.reference()
    for s in submissions:
        adapter_id = None if s.adapter is None else s.adapter.adapter_id
        expected = reference.generate(s.prompt_token_ids, adapter_id, s.sampling.max_new_tokens)
        assert recorder.tokens[s.sequence_id] == expected, f"sequence {s.sequence_id} with {adapter_id}"


def test_adapters_change_the_answer(model: TinyModel, device: str) -> None:
    """Otherwise equality would prove nothing about adapters."""
    prompt = list(range(40, 60))
    adapters = [None, *(AdapterReference(a, "sha256:0", str(model.adapters / a)) for a in model.adapter_ids)]
    recorder = Recorder(model, device)
    recorder.run([Submit(i, prompt, SamplingParameters(16), a) for i, a in enumerate(adapters)])
    assert len({tuple(t) for t in recorder.tokens.values()}) == len(adapters)


def test_a_broken_adapter_fails_its_own_requests_only(model: TinyModel, device: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "adapter_config.json").write_text("{")
    (broken / "adapter_model.safetensors").write_bytes(b"nothing")
    good = submissions_for(model, count=6, most_prompt=30, new_tokens=6, seed=2)
    bad = Submit(100, [1, 2, 3], SamplingParameters(4), AdapterReference("bad", "sha256:1", str(broken)))
    recorder = Recorder(model, device)
    recorder.run([*good[:3], bad, *good[3:]])
    assert recorder.failures[100].code == "adapter_invalid"
    assert set(recorder.finish_reasons) == {s.sequence_id for s in good}
