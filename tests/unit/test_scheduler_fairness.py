"""What fair queuing promises, measured from outside: service by what was computed, waits in steps."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_worker.engine.sequence import Sequence
from loramux_worker.scheduler import AdapterPolicy, Policies, SchedulerConfig
from unit.scheduler_support import FakeEngine, FakeTiers

BLOCK_SIZE = 4


def keep_backlogged(
    engine: FakeEngine, adapter_ids: Iterable[str | None], draw: Callable[[str], dict[str, int]]
) -> None:
    """Top the queue of each adapter up, so that a step cannot empty it."""
    for adapter_id in adapter_ids:
        key = None if adapter_id is None else (adapter_id, "r1")
        while len(engine.scheduler.queue.waiting(key)) <= engine.config.max_running:
            engine.add(adapter_id, **draw(str(adapter_id)))


def spread_of_service(
    engine: FakeEngine, first: str, second: str, draw: Callable[[str], dict[str, int]], num_steps: int
) -> float:
    """The most by which the service of two backlogged adapters differs over any interval of the run."""
    differences = [engine.services[first] - engine.services[second]]
    for _ in range(num_steps):
        keep_backlogged(engine, (first, second), draw)
        engine.step()
        differences.append(engine.services[first] - engine.services[second])
    return max(differences) - min(differences)


@settings(max_examples=40, deadline=None)
@given(
    first=st.tuples(st.integers(1, 30), st.integers(1, 20)),
    second=st.tuples(st.integers(1, 30), st.integers(1, 20)),
    max_batched_tokens=st.integers(2, 64),
    max_batch_sequences=st.integers(1, 16),
    num_blocks=st.integers(13, 60),
    weights=st.sampled_from([(1.0, 2.0), (1.0, 1.0), (3.0, 1.0)]),
    seed=st.integers(0, 100),
)
def test_two_backlogged_adapters_are_served_alike(
    first: tuple[int, int],
    second: tuple[int, int],
    max_batched_tokens: int,
    max_batch_sequences: int,
    num_blocks: int,
    weights: tuple[float, float],
    seed: int,
) -> None:
    """The bound of the paper, 2·max(w_in·L_input, w_out·M), and one chunk, for any mix of lengths."""
    config = SchedulerConfig(
        max_model_len=50,
        max_batched_tokens=max_batched_tokens,
        max_batch_sequences=max_batch_sequences,
        prompt_weight=weights[0],
        generated_weight=weights[1],
    )
    engine = FakeEngine(config, num_blocks=num_blocks, block_size=BLOCK_SIZE)
    random_ = random.Random(seed)
    lengths = {"first": first, "second": second}

    def draw(adapter_id: str) -> dict[str, int]:
        prompt, new = lengths[adapter_id]
        return {"prompt": random_.randint(1, prompt), "new": random_.randint(1, new)}

    longest_prompt = max(first[0], second[0])
    most_tokens = min(num_blocks * BLOCK_SIZE, max_batch_sequences * (longest_prompt + max(first[1], second[1])))
    bound = 2 * max(weights[0] * longest_prompt, weights[1] * most_tokens) + weights[0] * max_batched_tokens
    assert spread_of_service(engine, "first", "second", draw, 150) <= bound


@pytest.mark.parametrize("quantum", [0.0, 100.0, 400.0])
def test_with_one_slot_for_two_adapters_the_quantum_adds_to_the_bound(quantum: float) -> None:
    config = SchedulerConfig(max_model_len=40, max_batch_sequences=4, residency_quantum=quantum)
    engine = FakeEngine(config, num_blocks=40, tiers=FakeTiers(slots=1))

    def draw(_: str) -> dict[str, int]:
        return {"prompt": 10, "new": 10}

    one_sequence = 10 + 2 * 10
    bound = 2 * max(10, 2 * 4 * 20) + quantum + one_sequence
    assert spread_of_service(engine, "first", "second", draw, 1500) <= bound
    assert engine.services["first"] > 0.4 * sum(engine.services.values())
    assert engine.services["second"] > 0.4 * sum(engine.services.values())


@pytest.mark.parametrize("num_blocks", [400, 30])
def test_weights_share_the_service(num_blocks: int) -> None:
    """1 : 2 : 4 within 5 %, whatever the lengths, also while preempting."""
    config = SchedulerConfig(max_model_len=100, max_batched_tokens=64, max_batch_sequences=12)
    shares = {"bronze": 1.0, "silver": 2.0, "gold": 4.0}
    policies = Policies(AdapterPolicy(adapter_id, weight=share) for adapter_id, share in shares.items())
    engine = FakeEngine(config, num_blocks=num_blocks, policies=policies)
    random_ = random.Random(1)

    def draw(adapter_id: str) -> dict[str, int]:
        longest = {"bronze": 40, "silver": 20, "gold": 8}[adapter_id]
        return {"prompt": random_.randint(1, longest), "new": random_.randint(1, longest)}

    for _ in range(1500):
        keep_backlogged(engine, shares, draw)
        engine.step()
    total = sum(engine.services.values())
    for adapter_id, share in shares.items():
        assert engine.services[adapter_id] / total == pytest.approx(share / 7.0, rel=0.05)
    assert (engine.num_preemptions > 0) == (num_blocks == 30)


def test_the_engine_is_never_idle_while_something_can_run() -> None:
    """With one adapter's sequences and room for them, every seat is taken or every token is given."""
    config = SchedulerConfig(max_model_len=64, max_batched_tokens=32, max_batch_sequences=8)
    engine = FakeEngine(config, num_blocks=256)
    random_ = random.Random(2)
    for number in range(200):
        engine.add(f"adapter-{number % 20}", prompt=random_.randint(1, 30), new=random_.randint(1, 20))
    step = engine.step()
    while engine.scheduler.num_waiting:
        assert len(step.chunks) == 8 or sum(chunk.num_tokens for chunk in step.chunks) == 32
        step = engine.step()
    engine.drain(200)


def first_steps_of_light_ones(engine: FakeEngine, num_steps: int) -> list[int]:
    """20 light adapters send one request each now and then; steps each waited for its first chunk."""
    sent: list[tuple[int, Sequence]] = []
    for number in range(num_steps):
        if number % 5 == 0:
            light = engine.add(f"light-{number // 5 % 20}", prompt=8, new=8)
            sent.append((number, light))
        engine.step()
    return [engine.started_at[light.sequence_id] - number for number, light in sent[:-20]]


def test_a_flood_on_one_adapter_is_not_felt_by_the_others() -> None:
    config = SchedulerConfig(max_model_len=64, max_batched_tokens=64, max_batch_sequences=16)
    random_ = random.Random(3)
    quiet = FakeEngine(config, num_blocks=400)
    flooded = FakeEngine(config, num_blocks=400)
    flood = [flooded.add("flood", prompt=random_.randint(4, 12), new=random_.randint(4, 28)) for _ in range(1500)]
    for _ in range(20):
        flooded.step()
    before = flooded.num_steps
    alone = first_steps_of_light_ones(quiet, 500)
    waits = [wait - before for wait in first_steps_of_light_ones(flooded, 500)]
    assert max(alone) == 0
    assert max(waits) <= 6, "a seat gets free every step or two, and the next free one is theirs"
    assert sum(waits) / len(waits) <= 2.0
    assert flooded.scheduler.num_waiting > 800, "the flood is still there"
    assert any(sequence in flooded.finished for sequence in flood)


def test_a_seat_is_free_for_whoever_comes_into_a_flood_of_long_answers() -> None:
    """None of the flood ends for 200 steps, yet nobody waits: one seat in sixteen is for those of whom nothing runs."""
    config = SchedulerConfig(max_model_len=256, max_batched_tokens=128, max_batch_sequences=64)
    engine = FakeEngine(config, num_blocks=4000)
    for _ in range(200):
        engine.add("flood", prompt=8, new=200)
    for _ in range(20):
        engine.step()
    assert engine.scheduler.num_running == 60
    lights = [engine.add(f"light-{number}", prompt=8, new=8) for number in range(4)]
    step = engine.step()
    assert set(lights) <= {chunk.sequence for chunk in step.chunks}
    assert len(step.chunks) == 64
    for _ in range(8):
        engine.step()
    before = engine.num_steps
    assert {wait - before for wait in first_steps_of_light_ones(engine, 180)} == {0}


def test_no_seat_is_kept_from_those_of_whom_nothing_runs() -> None:
    config = SchedulerConfig(max_model_len=256, max_batched_tokens=1024, max_batch_sequences=64)
    engine = FakeEngine(config, num_blocks=4000)
    for number in range(100):
        engine.add(f"adapter-{number}", prompt=8, new=8)
    assert len(engine.step().chunks) == 64


def test_ten_thousand_adapters_with_one_request_each_are_all_answered_in_turn() -> None:
    config = SchedulerConfig(max_model_len=64, max_batch_sequences=64)
    engine = FakeEngine(config, num_blocks=800, tiers=FakeTiers(slots=16))
    engine.check = lambda step: None  # type: ignore[method-assign]  # it walks over everything that waits
    for number in range(10_000):
        engine.add(f"adapter-{number}", prompt=4, new=2)
    engine.drain(4000)
    starts = [engine.started_at[sequence_id] for sequence_id in range(10_000)]
    assert starts == sorted(starts), "nobody has had service, so arrival decides"
    assert engine.scheduler.queue.num_clients < 100


def test_an_adapter_that_was_away_gets_no_credit_for_it() -> None:
    config = SchedulerConfig(max_model_len=64, max_batch_sequences=4, max_batched_tokens=16)
    engine = FakeEngine(config, num_blocks=400)

    def draw(_: str) -> dict[str, int]:
        return {"prompt": 6, "new": 6}

    for _ in range(300):
        keep_backlogged(engine, ["busy"], draw)
        engine.step()
    assert engine.services["busy"] > 1000
    assert spread_of_service(engine, "busy", "back", draw, 300) <= 2 * max(6, 2 * 4 * 12) + 16
