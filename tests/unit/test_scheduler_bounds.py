"""What is promised whatever arrives: how far two adapters may be apart, how long one may wait, and no idle step."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_worker.engine.sequence import Sequence
from loramux_worker.scheduler import AdapterPolicy, Policies, SchedulerConfig
from unit.scheduler_support import FakeEngine, FakeTiers

BLOCK_SIZE = 4
LONGEST_PROMPT = MOST_NEW = 12
ONE_SEQUENCE = LONGEST_PROMPT + 2 * MOST_NEW  # weighted tokens


def send(engine: FakeEngine, draw: random.Random, adapter_id: str) -> Sequence:
    return engine.add(adapter_id, prompt=draw.randint(1, LONGEST_PROMPT), new=draw.randint(1, MOST_NEW))


def top_up(engine: FakeEngine, draw: random.Random, adapter_id: str) -> None:
    """Let more wait than a step can admit."""
    while len(engine.scheduler.queue.waiting((adapter_id, "r1"))) <= engine.config.max_running:
        send(engine, draw, adapter_id)


@settings(max_examples=12, deadline=None)
@given(
    num_adapters=st.integers(2, 6),
    slots=st.integers(1, 6),
    max_batched_tokens=st.integers(4, 48),
    max_batch_sequences=st.integers(1, 4),
    locality=st.sampled_from([0.0, 40.0, 200.0]),
    quantum=st.sampled_from([0.0, 60.0, 250.0]),
    weights=st.lists(st.sampled_from([1.0, 2.0, 4.0]), min_size=6, max_size=6),
    seed=st.integers(0, 1000),
)
def test_any_two_backlogged_adapters_stay_together(
    num_adapters: int,
    slots: int,
    max_batched_tokens: int,
    max_batch_sequences: int,
    locality: float,
    quantum: float,
    weights: list[float],
    seed: int,
) -> None:
    """The paper's bound, one chunk, and one quantum of what keeps resident adapters on; over any interval.

    Weighted service: service over weight. The last summand is the sequence with which a quantum is overstepped.
    """
    names = [f"adapter-{number}" for number in range(num_adapters)]
    shares = dict(zip(names, weights, strict=False))
    config = SchedulerConfig(
        max_model_len=LONGEST_PROMPT + MOST_NEW,
        max_batched_tokens=max_batched_tokens,
        max_batch_sequences=max_batch_sequences,
        locality=locality,
        residency_quantum=quantum,
    )
    policies = Policies(AdapterPolicy(name, weight=share) for name, share in shares.items())
    engine = FakeEngine(config, num_blocks=60, block_size=BLOCK_SIZE, tiers=FakeTiers(slots=slots), policies=policies)
    draw = random.Random(seed)
    spread: dict[tuple[str, str], list[float]] = {(a, b): [0.0, 0.0] for a in names for b in names if a < b}
    for _ in range(160):
        for name in names:
            top_up(engine, draw, name)
        engine.step()
        served = {name: engine.services[name] / shares[name] for name in names}
        for (first, second), lowest_and_highest in spread.items():
            difference = served[first] - served[second]
            lowest_and_highest[0] = min(lowest_and_highest[0], difference)
            lowest_and_highest[1] = max(lowest_and_highest[1], difference)
    most_tokens = max_batch_sequences * (LONGEST_PROMPT + MOST_NEW)
    bound = 2 * max(LONGEST_PROMPT, 2 * most_tokens) + max_batched_tokens + max(locality, quantum) + ONE_SEQUENCE
    assert max(highest - lowest for lowest, highest in spread.values()) <= bound


@settings(max_examples=20, deadline=None)
@given(
    slots=st.integers(1, 3),
    max_batch_ranks=st.sampled_from([16, 40]),
    max_batch_sequences=st.integers(1, 6),
    locality=st.sampled_from([0.0, 100.0]),
    residency_quantum=st.sampled_from([0.0, 100.0, 400.0]),
    max_skipped=st.integers(1, 4),
    patient_rank=st.sampled_from([4, 40]),
    seed=st.integers(0, 1000),
)
def test_no_request_waits_for_ever(
    slots: int, max_batch_ranks: int, patient_rank: int, max_batch_sequences: int, seed: int, **values: float
) -> None:
    """Adapters flood, new ones come all the time, some resident, some of high rank: one request gets its turn.

    It waits for what was admitted before it and for one quantum; then for the batch to end.
    """
    config = SchedulerConfig(
        max_model_len=LONGEST_PROMPT + MOST_NEW,
        max_batched_tokens=16,
        max_batch_ranks=max_batch_ranks,
        max_batch_sequences=max_batch_sequences,
        **values,  # type: ignore[arg-type]
    )
    tiers = FakeTiers(slots=slots, ranks={"patient": patient_rank})
    engine = FakeEngine(config, num_blocks=40, block_size=BLOCK_SIZE, tiers=tiers)
    draw = random.Random(seed)
    patient: Sequence | None = None
    for number in range(400):
        for adapter_id in ("flood-0", "flood-1", f"new-{number}"):
            if engine.scheduler.num_waiting < 40:
                send(engine, draw, adapter_id)
        if number == 20:
            patient = send(engine, draw, "patient")
        engine.step()
        if patient is not None and patient.first_scheduled_at is not None:
            return
    raise AssertionError("it starves")


@settings(max_examples=20, deadline=None)
@given(
    slots=st.integers(1, 4),
    locality=st.sampled_from([0.0, 100.0]),
    quantum=st.sampled_from([0.0, 100.0]),
    slow_loads=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_no_step_is_empty_while_something_can_run(
    slots: int, locality: float, quantum: float, slow_loads: bool, seed: int
) -> None:
    """`FakeEngine.check` asserts it in every step: without chunks, all that waits is being loaded."""
    config = SchedulerConfig(
        max_model_len=LONGEST_PROMPT + MOST_NEW,
        max_batched_tokens=16,
        max_batch_ranks=24,
        max_batch_sequences=6,
        locality=locality,
        residency_quantum=quantum,
    )
    ranks = {f"adapter-{number}": 2 << (number % 5) for number in range(8)}
    engine = FakeEngine(
        config, num_blocks=20, block_size=BLOCK_SIZE, tiers=FakeTiers(slots, ranks, slow_loads=slow_loads)
    )
    draw = random.Random(seed)
    sent = 0
    for _ in range(100):
        if draw.random() < 0.5:
            send(engine, draw, f"adapter-{draw.randrange(8)}")
            sent += 1
        if engine.tiers.loading and draw.random() < 0.3:
            key = draw.choice(list(engine.tiers.loading))
            engine.tiers.end_load(key)
            engine.scheduler.adapter_loaded(key)
        engine.step()
    engine.drain(3000)
    assert len(engine.finished) == sent


def test_adapters_that_run_go_first_within_the_bound_and_no_further() -> None:
    def most_apart(locality: float) -> float:
        engine = FakeEngine(SchedulerConfig(max_model_len=64, max_batch_sequences=2, locality=locality))
        for number in range(60):
            engine.add("ab"[number % 2], prompt=4, new=3 + number // 2 % 3)  # at most 14 weighted tokens
        apart = 0.0
        for _ in range(60):
            engine.step()
            apart = max(apart, abs(engine.services["a"] - engine.services["b"]))
        return apart

    assert most_apart(0.0) <= 2 * 14
    assert 80 < most_apart(100.0) <= 100 + 3 * 14
