"""A step launched before the last one's tokens were read changes nothing but the time."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import pytest

from loramux_worker.engine.protocol import AdapterReference, Cancel, SamplingParameters, Submit
from tiny_models import TinyModel, kv_cache_bytes, make_model
from unit.engine_support import EOS, Recorder, submissions_for

PROMPTS = [[5, 6, 7, 8], [100], list(range(30, 60)), [7] * 20]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("model"), "llama", num_adapters=2)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def make_recorder(model: TinyModel, device: str, depth: int, **config: Any) -> Recorder:
    kv_cache = kv_cache_bytes(model.path, num_blocks=config.pop("num_blocks", 400), block_size=8)
    sizes = {"block_size": 8, "kv_cache_memory": kv_cache, "adapter_memory": 1 << 22, "host_memory": 1 << 24}
    return Recorder(model, device, pipeline_depth=depth, **{**sizes, "max_model_len": 256, **config})


def run_both(model: TinyModel, device: str, submissions: Iterable[Submit], **config: Any) -> tuple[Recorder, Recorder]:
    """Both ways; every word about every sequence is the same."""
    at_once, ahead = (make_recorder(model, device, depth, **config) for depth in (0, 1))
    for recorder in (at_once, ahead):
        recorder.run(list(submissions))
        assert recorder.parts.blocks.num_used == 0
    assert ahead.tokens == at_once.tokens
    assert ahead.finish_reasons == at_once.finish_reasons
    assert ahead.logprobs.keys() == at_once.logprobs.keys()
    return at_once, ahead


def submit_all(sampling: SamplingParameters) -> list[Submit]:
    return [Submit(i, prompt, sampling) for i, prompt in enumerate(PROMPTS)]


def with_adapters(model: TinyModel, submissions: list[Submit]) -> list[Submit]:
    references = [AdapterReference(a, "sha256:0", str(model.adapters / a)) for a in model.adapter_ids]
    choice = [None, *references]
    return [msgspec.structs.replace(s, adapter=choice[i % len(choice)]) for i, s in enumerate(submissions)]


def test_a_step_is_launched_before_the_last_is_read(model: TinyModel, device: str) -> None:
    recorder = make_recorder(model, device, 1)
    engine = recorder.parts.engine
    engine.handle(Submit(0, [1, 2, 3], SamplingParameters(3)))
    heard = []
    while engine.has_work:
        assert engine.step()
        heard.append((engine.steps_total, len(recorder.tokens.get(0, []))))
    assert heard == [(1, 0), (2, 1), (3, 2), (3, 3)], "and none after the one that samples the last token"
    assert not engine.step()
    assert recorder.timings[0].prefill > 0


@pytest.mark.parametrize("new_tokens", [1, 2, 9])
def test_as_many_tokens_as_asked_for(model: TinyModel, device: str, new_tokens: int) -> None:
    at_once, ahead = run_both(model, device, submit_all(SamplingParameters(new_tokens)))
    assert all(len(tokens) == new_tokens for tokens in ahead.tokens.values())
    assert set(ahead.finish_reasons.values()) == {"length"}
    assert ahead.parts.engine.steps_total == at_once.parts.engine.steps_total


def test_the_longest_sequence_ends_at_the_models_limit(model: TinyModel, device: str) -> None:
    _, ahead = run_both(model, device, submit_all(SamplingParameters(500)), max_model_len=40, num_blocks=6)
    assert {i: len(t) + len(PROMPTS[i]) for i, t in ahead.tokens.items()} == dict.fromkeys(range(4), 40)
    assert ahead.parts.engine.preemptions_total > 0


@pytest.mark.parametrize("kind", ["eos_token_ids", "stop_token_ids"])
def test_an_end_in_the_middle(model: TinyModel, device: str, kind: str) -> None:
    free, _ = run_both(model, device, submit_all(SamplingParameters(24)))
    ends = {i: tokens[5] for i, tokens in free.tokens.items()}
    submissions = [
        Submit(i, PROMPTS[i], msgspec.structs.replace(SamplingParameters(24), **{kind: (end,)}))
        for i, end in ends.items()
    ]
    _, ahead = run_both(model, device, submissions)
    for i, end in ends.items():
        assert ahead.tokens[i] == free.tokens[i][: free.tokens[i].index(end) + 1]
    assert set(ahead.finish_reasons.values()) == {{"eos_token_ids": "eos_token"}.get(kind, "stop_sequence")}


def test_every_kind_of_sampling_under_preemption(model: TinyModel, device: str) -> None:
    kinds = [
        SamplingParameters(30, temperature=0.9, seed=11),
        SamplingParameters(30, temperature=0.7, top_p=0.9, seed=12, eos_token_ids=(EOS,)),
        SamplingParameters(30, temperature=1.3, top_k=20, min_p=0.01, seed=13, logprobs=2),
        SamplingParameters(30, repetition_penalty=1.3, frequency_penalty=0.4, logprobs=0),
        SamplingParameters(30, temperature=0.8, presence_penalty=1.0, repetition_penalty=1.1, seed=14),
        SamplingParameters(12, min_new_tokens=8, eos_token_ids=tuple(range(300)), logprobs=3),
        SamplingParameters(30, logprobs=1),
        SamplingParameters(30),
    ]
    submissions = [
        Submit(i, s.prompt_token_ids, kinds[i % len(kinds)])
        for i, s in enumerate(submissions_for(model, count=24, most_prompt=60, new_tokens=1, seed=3))
    ]
    config = {"num_blocks": 34, "max_batched_tokens": 40}
    at_once, ahead = run_both(model, device, with_adapters(model, submissions), **config)
    assert min(r.parts.engine.preemptions_total for r in (at_once, ahead)) > 0
    for i, logprobs in ahead.logprobs.items():
        wanted = kinds[i % len(kinds)].logprobs
        for mine, other, token in zip(logprobs, at_once.logprobs[i], ahead.tokens[i], strict=True):
            assert (mine is None) == (other is None) == (wanted is None)
            if mine is not None and other is not None:
                assert mine.logprob == pytest.approx(other.logprob, abs=1e-3)
                assert len(mine.top) == wanted
                assert all(mine.logprob == p for t, p in mine.top if t == token)


def test_a_resubmitted_sequence_goes_on_where_it_was(model: TinyModel, device: str) -> None:
    """Its penalties count the tokens it comes with once, and its draws do not begin anew."""
    sampling = SamplingParameters(20, temperature=0.8, seed=5, frequency_penalty=0.6, repetition_penalty=1.2)
    whole, _ = run_both(model, device, submit_all(sampling))
    again = [Submit(i, PROMPTS[i], sampling, generated_token_ids=whole.tokens[i][:7]) for i in range(len(PROMPTS))]
    _, rest = run_both(model, device, again)
    assert {i: whole.tokens[i][:7] + tokens for i, tokens in rest.tokens.items()} == whole.tokens


def test_one_that_brings_all_its_tokens_is_given_one_more(model: TinyModel, device: str) -> None:
    _, ahead = run_both(model, device, [Submit(0, [1, 2], SamplingParameters(3), generated_token_ids=[3, 4, 5])])
    assert len(ahead.tokens[0]) == 1
    assert ahead.finish_reasons[0] == "length"


def test_one_that_is_cancelled_in_flight_is_heard_of_no_more(model: TinyModel, device: str) -> None:
    alone, _ = run_both(model, device, submit_all(SamplingParameters(12)))
    recorder = make_recorder(model, device, 1)
    engine = recorder.parts.engine
    for submission in submit_all(SamplingParameters(12)):
        engine.handle(submission)
    for _ in range(4):
        engine.step()
    heard = list(recorder.tokens[0])
    engine.handle(Cancel(0))
    engine.handle(Submit(0, PROMPTS[1], SamplingParameters(3)))  # the id and the blocks have a new owner at once
    while engine.has_work:
        engine.step()
        recorder.parts.scheduler.check_integrity()
    assert heard == alone.tokens[0][: len(heard)]
    assert recorder.tokens.pop(0) == heard + alone.tokens[1][:3]
    assert recorder.tokens == {i: tokens for i, tokens in alone.tokens.items() if i}
    assert recorder.parts.blocks.num_used == 0
