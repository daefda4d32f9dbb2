"""What cannot end before its deadline is given up at once, by how long steps take."""

from __future__ import annotations

import pytest

from loramux_worker.engine.sequence import Sequence, SequenceStatus
from loramux_worker.scheduler import SchedulerConfig
from loramux_worker.scheduler.deadlines import StepClock
from unit.scheduler_support import FakeEngine, make_sequence


def warm_engine() -> FakeEngine:
    """It has made steps of a second each, as `FakeEngine` does."""
    engine = FakeEngine(SchedulerConfig(max_model_len=256, max_batched_tokens=8, max_batch_sequences=2))
    engine.add("warm", prompt=2, new=40)
    engine.drain(60)
    return engine


def sure(engine: FakeEngine, *, deadline: float, fewest: int, prompt: int = 4, new: int = 20) -> Sequence:
    sequence = make_sequence(len(engine.sequences), "a", prompt=prompt, new=new, deadline=deadline)
    sequence.fewest_tokens = fewest
    return engine.submit(sequence)


def test_a_sequence_that_needs_too_many_steps_is_given_up_before_it_runs() -> None:
    engine = warm_engine()
    hopeless = sure(engine, deadline=115.0, fewest=20)
    possible = sure(engine, deadline=120.5, fewest=20)
    perhaps = sure(engine, deadline=115.0, fewest=1)
    assert engine.scheduler.expire(100.0) == [hopeless]
    assert hopeless.status is SequenceStatus.FINISHED
    assert {possible.status, perhaps.status} == {SequenceStatus.WAITING}
    engine.scheduler.check_integrity()


def test_a_prompt_of_many_chunks_needs_a_step_for_each() -> None:
    engine = warm_engine()
    long = sure(engine, deadline=107.0, fewest=1, prompt=80)
    assert engine.scheduler.expire(96.5) == []
    assert engine.scheduler.expire(97.0) == [long], "ten steps of a second"


def test_one_that_comes_on_as_it_must_is_kept_and_ends_in_time() -> None:
    engine = warm_engine()
    start = 100.0 - engine.num_steps
    sequence = sure(engine, deadline=100.0 + 21.0, fewest=20)
    while sequence.status is not SequenceStatus.FINISHED:
        assert engine.scheduler.expire(start + engine.num_steps) == []
        engine.step()
    assert sequence in engine.finished


def test_one_that_falls_behind_while_it_runs_is_given_up() -> None:
    engine = warm_engine()
    sequence = sure(engine, deadline=125.0, fewest=20)
    for _ in range(5):
        engine.step()
    assert engine.scheduler.expire(109.0) == []
    assert engine.scheduler.expire(112.0) == [sequence]
    assert engine.blocks.num_used == 0


def test_nothing_is_given_up_early_before_steps_were_timed() -> None:
    engine = FakeEngine(SchedulerConfig(max_model_len=256))
    sequence = sure(engine, deadline=100.0, fewest=200, new=200)
    assert engine.scheduler.expire(99.9) == []
    assert engine.scheduler.expire(100.0) == [sequence]


def test_the_clock_knows_the_fastest_steps_of_the_last_while() -> None:
    clock = StepClock()
    now = 0.0

    def run(steps: int, seconds: float) -> None:
        nonlocal now
        for _ in range(steps):
            clock.tick(now, has_chunks=True)
            now += seconds

    run(16, 0.020)
    assert clock.least_seconds == 0.0
    run(1, 0.020)
    assert clock.least_seconds == pytest.approx(0.020)
    run(64, 0.005)
    assert clock.least_seconds == pytest.approx(0.005)
    run(160, 0.030)
    assert clock.least_seconds == pytest.approx(0.030), "what was fast long ago is forgotten"
    clock.tick(now, has_chunks=False)
    now += 1000.0
    run(17, 0.010)
    assert clock.least_seconds == pytest.approx(0.010), "the idle time is no step"
