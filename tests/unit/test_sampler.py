"""The sampler against plain arithmetic on each row, with its tokens never shown to it by the host."""

from __future__ import annotations

import contextlib
import random
import warnings
from collections.abc import Iterator

import pytest
import torch

from loramux_worker.engine import sampler as sampler_module
from loramux_worker.engine.pending_sample import PendingSample
from loramux_worker.engine.protocol import SamplingParameters
from loramux_worker.engine.sampler import Sampler
from loramux_worker.engine.sequence import PENDING_TOKEN, Sequence
from loramux_worker.engine.transfers import download, upload

VOCAB = 40


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


def make_sequences(*kinds: SamplingParameters) -> list[Sequence]:
    rng = random.Random(0)
    return [Sequence(i, [rng.randrange(VOCAB) for _ in range(5)], kind) for i, kind in enumerate(kinds)]


def random_logits(rows: int, seed: int, device: torch.device, vocab: int = VOCAB) -> torch.Tensor:
    return (torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2).to(device)


def sample(sampler: Sampler, logits: torch.Tensor, sequences: list[Sequence]) -> PendingSample:
    """One step: the sampler sees a placeholder where the engine would have one."""
    pending = sampler(logits, sequences)
    for sequence in sequences:
        sequence.generated_token_ids.append(PENDING_TOKEN)
    return pending


ALL_KINDS = [
    SamplingParameters(50),
    SamplingParameters(50, logprobs=2),
    SamplingParameters(50, temperature=0.8, seed=1),
    SamplingParameters(50, temperature=0.8, seed=1, top_k=5),
    SamplingParameters(50, temperature=1.4, seed=2, top_p=0.8, logprobs=0),
    SamplingParameters(50, temperature=1.0, seed=3, min_p=0.1, repetition_penalty=1.4),
    SamplingParameters(50, temperature=0.9, seed=4, top_k=VOCAB + 5, frequency_penalty=0.7),
    SamplingParameters(50, presence_penalty=1.5, min_new_tokens=6, eos_token_ids=tuple(range(0, VOCAB, 2))),
]


def test_penalties_count_tokens_that_the_host_has_not_read(device: torch.device) -> None:
    kind = SamplingParameters(50, repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=0.25)
    (sequence,) = make_sequences(kind)
    sequence.generated_token_ids = [9, 9, 11]  # from another engine
    prompt, generated = sequence.prompt_token_ids, [9, 9, 11]
    sampler = Sampler(VOCAB, device)
    for step in range(12):
        logits = random_logits(1, step, device)
        expected = logits[0].tolist()
        for token in {*prompt, *generated}:
            expected[token] *= 1.5 if expected[token] < 0 else 1 / 1.5
        for token in set(generated):
            expected[token] -= 0.5 + 0.25 * generated.count(token)
        generated.append(expected.index(max(expected)))
        assert sample(sampler, logits, [sequence]).wait()[0].token_id == generated[-1]
    assert max(map(generated.count, generated)) > 1


@pytest.mark.parametrize("at_once", [1, 3, 1000])
def test_a_row_is_the_same_in_any_batch(device: torch.device, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for bound in ("_MOST_ELEMENTS", "_MOST_DRAWN_ON_GPU"):
        monkeypatch.setattr(sampler_module, bound, at_once * VOCAB)
    together = make_sequences(*ALL_KINDS)
    alone = make_sequences(*ALL_KINDS)
    one, each = Sampler(VOCAB, device), [Sampler(VOCAB, device) for _ in alone]
    for step in range(10):
        logits = random_logits(len(ALL_KINDS), step, device)
        order = random.Random(step).sample(range(len(ALL_KINDS)), len(ALL_KINDS))
        mixed = sample(one, logits[order], [together[i] for i in order]).wait()
        for row, i in enumerate(order):
            (single,) = sample(each[i], logits[i : i + 1], [alone[i]]).wait()
            assert mixed[row].token_id == single.token_id
            assert (mixed[row].logprobs is None) == (single.logprobs is None) == (ALL_KINDS[i].logprobs is None)


def test_no_end_before_min_new_tokens(device: torch.device) -> None:
    kind = SamplingParameters(50, min_new_tokens=3, eos_token_ids=(7,), stop_token_ids=(8, VOCAB + 3))
    sequences = make_sequences(kind, SamplingParameters(50))
    sampler = Sampler(VOCAB, device)
    logits = torch.zeros(2, VOCAB, device=device)
    logits[:, 7], logits[:, 8], logits[:, 9] = 3.0, 2.0, 1.0
    tokens = [[t.token_id for t in sample(sampler, logits, sequences).wait()] for _ in range(5)]
    assert tokens == [[9, 7]] * 3 + [[7, 7]] * 2


def test_logprobs_are_the_models_own(device: torch.device) -> None:
    kinds = [
        SamplingParameters(5, temperature=2.0, seed=3, repetition_penalty=1.5, logprobs=3),
        SamplingParameters(5),
        SamplingParameters(5, logprobs=VOCAB + 1),
        SamplingParameters(5, logprobs=0),
    ]
    logits = random_logits(4, 1, device)
    tokens = sample(Sampler(VOCAB, device), logits, make_sequences(*kinds)).wait()
    expected = logits.cpu().double().log_softmax(-1)
    assert tokens[1].logprobs is None
    for i, count in ((0, 3), (2, VOCAB), (3, 0)):
        logprobs = tokens[i].logprobs
        assert logprobs is not None
        assert logprobs.logprob == pytest.approx(expected[i, tokens[i].token_id].item(), abs=1e-5)
        best = expected[i].topk(count)
        assert [token for token, _ in logprobs.top] == best.indices.tolist()
        assert [p for _, p in logprobs.top] == pytest.approx(best.values.tolist(), abs=1e-5)


def test_rows_of_the_usage_are_given_on(device: torch.device) -> None:
    kind = SamplingParameters(50, frequency_penalty=2.0)
    sampler = Sampler(VOCAB, device)
    logits = torch.zeros(1, VOCAB, device=device)
    for number in range(30):
        old, new = Sequence(2 * number, [0], kind), Sequence(2 * number + 1, [0], kind)
        assert [sample(sampler, logits, [old]).wait()[0].token_id for _ in range(3)] == [0, 1, 2]
        sampler.forget(old.sequence_id)
        assert sample(sampler, logits, [new]).wait()[0].token_id == 0
        sampler.forget(new.sequence_id)
    many = [Sequence(100 + i, [0], kind) for i in range(30)]
    for expected in range(3):
        tokens = sample(sampler, torch.zeros(30, VOCAB, device=device), many).wait()
        assert [t.token_id for t in tokens] == [expected] * 30


def test_upload_and_download(device: torch.device) -> None:
    ints, floats = upload(device, [[1, -(2**63)], [], [2**63 - 1]], [[0.1], [], [float("inf"), -2.5]])
    on_host = [download(t) for t in ints]
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert [t.tolist() for t in on_host] == [[1, -(2**63)], [], [2**63 - 1]]
    assert [t.tolist() for t in floats] == [[0.1], [], [float("inf"), -2.5]]
    assert {t.device.type for t in (*ints, *floats)} == {device.type}


@contextlib.contextmanager
def waiting_is_an_error() -> Iterator[None]:
    """Inside it what stops the host until the device is done raises, as far as torch notices."""

    def set_mode(mode: str) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*prototype feature", UserWarning)  # the mode says it of itself
            torch.cuda.set_sync_debug_mode(mode)

    try:
        set_mode("error")
        yield
    finally:
        set_mode("default")


@pytest.mark.gpu
def test_sampling_waits_for_nothing() -> None:
    device = torch.device("cuda")
    sampler, sequences = Sampler(VOCAB, device), make_sequences(*ALL_KINDS)
    for step in range(3):
        logits = random_logits(len(ALL_KINDS), step, device)
        with waiting_is_an_error():
            pending = sample(sampler, logits, sequences)
        assert len(pending.wait()) == len(ALL_KINDS)
