"""The engine over the fused decoder: PEFT's tokens, with adapters of any rank and target beside each other."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import cache

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from loramux_kernels import decode_attention_triton
from loramux_worker.engine.graphs import GraphKey, StepGraphs
from loramux_worker.engine.protocol import AdapterReference, SamplingParameters, Submit
from loramux_worker.engine.runner import Runner
from loramux_worker.model.attention import IMPLEMENTATION
from loramux_worker.model.loader import ServedModel, prepare_model
from tiny_models import TinyModel, make_model, save_adapter
from unit.engine_support import Recorder

pytest.importorskip("triton")

ALL_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {  # by adapter: rank and modules
    "all": (4, ALL_LINEARS),
    "queries": (20, ["q_proj", "v_proj"]),  # more than one page of ranks
    "down": (8, ["k_proj", "up_proj", "down_proj"]),
    "edges": (3, ["o_proj", "embed_tokens", "lm_head"]),
}
RANKS = (4, 8, 16, 64, 128)


class Adapters:
    """A tiny Llama, adapters for it, and PEFT's greedy tokens."""

    def __init__(self, tiny: TinyModel) -> None:
        self.tiny = tiny
        self._reference = tiny.reference()
        self.expected = cache(self._expected)

    @classmethod
    def make(cls, folder, adapters: dict[str, tuple[int, list[str]]]) -> Adapters:
        base = make_model(folder, "llama", num_adapters=0)
        for seed, (adapter_id, (rank, targets)) in enumerate(adapters.items()):
            save_adapter(base.path, base.adapters / adapter_id, targets, rank=rank, seed=seed)
        return cls(TinyModel(base.path, base.adapters, tuple(adapters)))

    def submit(self, sequence_id: int, prompt: tuple[int, ...], adapter_id: str | None, new_tokens: int) -> Submit:
        adapter = None if adapter_id is None else self.reference(adapter_id)
        return Submit(sequence_id, list(prompt), SamplingParameters(new_tokens), adapter)

    def reference(self, adapter_id: str) -> AdapterReference:
        return AdapterReference(adapter_id, "sha256:0", str(self.tiny.adapters / adapter_id))

    def check(self, recorder: Recorder, submission: Submit) -> None:
        adapter_id = submission.adapter.adapter_id if submission.adapter else None
        new_tokens = submission.sampling.max_new_tokens
        expected = self.expected(tuple(submission.prompt_token_ids), adapter_id, new_tokens)
        tokens = recorder.tokens[submission.sequence_id]
        assert tokens[: len(expected)] == expected, f"sequence {submission.sequence_id} with {adapter_id}"

    def _expected(self, prompt: tuple[int, ...], adapter_id: str | None, new_tokens: int) -> list[int]:
        return self._reference.generate(list(prompt), adapter_id, new_tokens)


class EagerGraphs(StepGraphs):
    """What the graphs would do, kernel by kernel: every step is padded to one of their shapes."""

    def capture(self) -> None:
        self._graphs = dict.fromkeys(self._keys())  # type: ignore[arg-type]
        self.replayed: list[GraphKey] = []

    def replay(self, key: GraphKey) -> torch.Tensor:
        self.replayed.append(key)
        return self._run(key)


def pad_to_graphs(runner: Runner) -> EagerGraphs:
    """`capture_graphs` on a CPU."""
    limits, model = runner._limits, runner._model
    runner._logits = torch.full((limits.max_batch_sequences, model.vocab_size), torch.nan)
    graphs = EagerGraphs(
        runner._prepare_capture, runner._run_static, limits.max_batch_sequences, limits.max_batched_tokens
    )
    graphs.capture()
    runner.graphs = graphs
    return graphs


def load_fused(path) -> ServedModel:
    module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation=IMPLEMENTATION)
    return prepare_model(module, torch.device("cpu"), name="tiny", fused=True)


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return Adapters.make(tmp_path_factory.mktemp("model"), TARGETS)


BATCHES: dict[str, list[tuple[tuple[int, ...], str | None]]] = {
    "as it is": [((40, 41, 42), "all"), ((7,), "queries"), ((100, 3), "down"), ((5,), None), ((250,), "edges")],
    "padded": [(tuple(range(40, 50)), "all"), ((7,), "queries"), ((100, 3), None)],
    "merged": [((40, 41, 42), "all"), ((7,), "queries"), ((100, 3), None), ((5,), "down")],
}
MERGED = "down"


@pytest.fixture
def uninitialised_is_nan() -> Iterator[None]:
    """What nobody wrote is not a number: who read it has none either. NumPy, which interprets, does not mind."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        with np.errstate(all="ignore"):
            yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on the CPU the kernels run in the interpreter alone")
@pytest.mark.usefixtures("uninitialised_is_nan")
@pytest.mark.parametrize("how", BATCHES)
def test_tokens_equal_peft_in_the_interpreter(few: Adapters, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_attention_triton, "num_splits", lambda num_rows, num_kv_heads: 2)  # there is one thread
    recorder = Recorder(
        few.tiny,
        "cpu",
        served=load_fused(few.tiny.path),
        block_size=4,
        max_model_len=16,
        max_batched_tokens=16,
        max_batch_sequences=5,
        max_lora_rank=20,
        merge_adapter=few.reference(MERGED) if how == "merged" else None,
        kv_cache_memory=1 << 20,
        adapter_memory=1 << 20,
        host_memory=1 << 20,
    )
    graphs = pad_to_graphs(recorder.parts.runner) if how != "as it is" else None
    submissions = [few.submit(i, *request, 2) for i, request in enumerate(BATCHES[how])]
    recorder.load([s.adapter for s in submissions if s.adapter and (how, s.adapter.adapter_id) != ("merged", MERGED)])
    for submission in submissions:
        recorder.parts.engine.handle(submission)
    recorder.run([])
    assert recorder.parts.engine.steps_total == 2, "all in one batch"
    for submission in submissions:
        few.check(recorder, submission)
    if graphs is not None:
        prefill, decode = graphs.replayed
        assert prefill.lora
        assert decode.lora
    if how == "padded":
        assert (prefill.shape.tokens, prefill.shape.most_query_tokens) == (16, 16)
        assert prefill.shape.segments, "few adapters have many rows"
        assert (decode.shape.tokens, decode.shape.most_query_tokens, decode.shape.segments) == (4, 1, 0)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graphs", [False, True], ids=["kernels", "graphs"])
def test_ranks_side_by_side_in_small_and_large_batches(
    tmp_path_factory: pytest.TempPathFactory, cuda_graphs: bool
) -> None:
    adapters = {f"rank-{rank}": (rank, ALL_LINEARS) for rank in RANKS}
    model = Adapters.make(tmp_path_factory.mktemp("model"), adapters)
    recorder = Recorder(
        model.tiny,
        "cuda",
        cuda_graphs=cuda_graphs,
        max_batch_sequences=64,
        max_batched_tokens=128,
        max_lora_rank=max(RANKS),
        max_model_len=128,
        kv_cache_memory=1 << 26,
        adapter_memory=1 << 26,
        host_memory=1 << 26,
    )
    recorder.load([model.reference(adapter_id) for adapter_id in adapters])
    engine = recorder.parts.engine
    rng = random.Random(4)
    choice = [*adapters, None]
    largest = 0
    for count in (1, 2, 5, 6, 17, 33, 64):
        submissions = []
        for i in range(count):
            prompt = tuple(rng.randrange(256) for _ in range(rng.choice((1, 2, 5, 30))))
            submissions.append(model.submit(1000 * count + i, prompt, choice[i % len(choice)], 16))
        for submission in submissions:
            engine.handle(submission)
        while engine.has_work:
            engine.step()
            largest = max(largest, engine.batch_sequences)
        for submission in submissions:
            model.check(recorder, submission)
    assert largest == 64
    assert recorder.has_replayed_graphs == cuda_graphs
