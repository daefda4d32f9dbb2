from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from loramux_worker.engine.kv_cache import BlockPool
from loramux_worker.engine.sequence import Sequence, SequenceStatus
from loramux_worker.errors import ConfigurationError
from loramux_worker.scheduler import Scheduler, SchedulerConfig, Step
from unit.scheduler_support import FakeEngine, FakeTiers, make_sequence


def make_engine(tiers: FakeTiers | None = None, num_blocks: int = 256, **values: object) -> FakeEngine:
    config = SchedulerConfig(**{"max_model_len": 256, **values})  # type: ignore[arg-type]
    return FakeEngine(config, num_blocks=num_blocks, tiers=tiers)


def given(step: Step) -> dict[int, int]:
    return {chunk.sequence.sequence_id: chunk.num_tokens for chunk in step.chunks}


def run_until_finished(engine: FakeEngine, sequence: Sequence, max_steps: int = 1000) -> int:
    """Steps until the sequence has finished."""
    for number in range(max_steps):
        if sequence.status is SequenceStatus.FINISHED:
            return number
        engine.step()
    raise AssertionError("the sequence does not finish")


class TestSteps:
    def test_a_prompt_is_read_in_chunks_and_then_decoded(self) -> None:
        engine = make_engine(max_batched_tokens=8)
        sequence = engine.add(prompt=20, new=3)
        assert [given(engine.step()) for _ in range(5)] == [{0: 8}, {0: 8}, {0: 4}, {0: 1}, {0: 1}]
        assert sequence.status is SequenceStatus.FINISHED
        assert sequence.generated_token_ids == [0, 1, 2]
        assert engine.blocks.num_used == 0
        assert given(engine.step()) == {}

    def test_a_chunk_samples_when_it_reaches_the_last_known_token(self) -> None:
        engine = make_engine(max_batched_tokens=8)
        engine.add(prompt=12, new=2)
        samples = []
        for _ in range(3):
            step = engine.scheduler.schedule(0.0)
            samples.append([chunk.samples for chunk in step.chunks])
            engine.scheduler.advance(step)
            for chunk, sampled in zip(step.chunks, samples[-1], strict=True):
                if sampled:
                    chunk.sequence.generated_token_ids.append(7)
        assert samples == [[False], [True], [True]]

    def test_decoding_sequences_come_before_prompts(self) -> None:
        engine = make_engine(max_batched_tokens=8)
        engine.add(prompt=2, new=50)
        engine.add(prompt=2, new=50)
        assert given(engine.step()) == {0: 2, 1: 2}
        engine.add(prompt=30, new=1)
        assert given(engine.step()) == {0: 1, 1: 1, 2: 6}
        engine.add(prompt=3, new=1)
        assert given(engine.step()) == {0: 1, 1: 1, 2: 6}, "a prompt that was begun goes before new ones"

    def test_no_more_sequences_run_than_a_step_has_tokens(self) -> None:
        engine = make_engine(max_batched_tokens=4, max_batch_sequences=100)
        for _ in range(10):
            engine.add(prompt=1, new=6)
        engine.step()
        assert engine.scheduler.num_running == 4
        engine.drain(100)

    def test_no_more_sequences_run_than_configured(self) -> None:
        engine = make_engine(max_batch_sequences=3)
        for _ in range(5):
            engine.add(prompt=4, new=4)
        assert given(engine.step()) == {0: 4, 1: 4, 2: 4}
        assert (engine.scheduler.num_running, engine.scheduler.num_waiting) == (3, 2)

    def test_a_sequence_that_brings_generated_tokens_goes_on_from_them(self) -> None:
        engine = make_engine()
        sequence = make_sequence(0, prompt=6, new=5)
        sequence.generated_token_ids = [10, 11]
        engine.submit(sequence)
        assert given(engine.step()) == {0: 8}
        engine.drain(10)
        assert sequence.generated_token_ids == [10, 11, 2, 3, 4]

    def test_times_are_stamped_once(self) -> None:
        engine = make_engine(FakeTiers(slow_loads=True))
        sequence = engine.add("a", prompt=2, new=3)
        sequence.submitted_at = 0.5
        engine.scheduler.schedule(1.0)
        assert (sequence.adapter_ready_at, sequence.first_scheduled_at) == (None, None)
        engine.tiers.end_load(("a", "r1"))
        engine.scheduler.adapter_loaded(("a", "r1"))
        engine.scheduler.advance(engine.scheduler.schedule(2.0))
        engine.scheduler.schedule(3.0)
        assert (sequence.adapter_ready_at, sequence.first_scheduled_at) == (2.0, 2.0)

    def test_a_sequence_whose_token_is_not_there_yet_is_left_out(self) -> None:
        engine = make_engine()
        engine.add(prompt=2, new=3)
        engine.scheduler.advance(engine.scheduler.schedule(0.0))
        assert engine.scheduler.schedule(0.0).chunks == ()
        assert engine.scheduler.num_running == 1


class TestEnds:
    def test_cancel_in_any_state(self) -> None:
        engine = make_engine(FakeTiers(slow_loads=True), max_batch_sequences=1)
        running, waiting, loading = engine.add(prompt=9, new=9), engine.add(), engine.add("a")
        engine.step()
        for sequence in (running, waiting, loading):
            assert engine.scheduler.cancel(sequence.sequence_id) is sequence
            assert sequence.status is SequenceStatus.FINISHED
            assert sequence.block_table == []
            engine.scheduler.check_integrity()
        assert engine.scheduler.cancel(running.sequence_id) is None
        assert engine.blocks.num_used == engine.scheduler.num_waiting == 0

    def test_finishing_twice_does_nothing(self) -> None:
        engine = make_engine()
        sequence = engine.add()
        engine.step()
        engine.scheduler.finish(sequence)
        engine.scheduler.finish(sequence)
        engine.scheduler.check_integrity()

    def test_a_sequence_that_ends_during_the_forward_pass_is_passed_by(self) -> None:
        engine = make_engine()
        gone, stays = engine.add("a"), engine.add("b")
        step = engine.scheduler.schedule(0.0)
        engine.scheduler.cancel(gone.sequence_id)
        engine.scheduler.advance(step)
        assert (gone.num_computed_tokens, stays.num_computed_tokens) == (0, 4)
        engine.scheduler.check_integrity()

    def test_deadlines(self) -> None:
        engine = make_engine(FakeTiers(slow_loads=True), max_batch_sequences=1)
        running = engine.add(prompt=4, new=100, deadline=20.0)
        engine.add(deadline=40.0)
        waiting, loading = engine.add(deadline=10.0), engine.add("a", deadline=30.0)
        never = engine.add()
        engine.step()
        assert engine.scheduler.expire(9.9) == []
        assert engine.scheduler.expire(10.0) == [waiting]
        assert engine.scheduler.expire(35.0) == [running, loading]
        assert engine.blocks.num_used == 0
        engine.tiers.loading.clear()
        engine.drain(50)
        assert never in engine.finished
        assert engine.scheduler.expire(100.0) == [], "one that finished does not expire"

    def test_an_id_comes_once_at_a_time(self) -> None:
        engine = make_engine()
        engine.scheduler.add(make_sequence(3))
        with pytest.raises(ValueError, match="3 was added twice"):
            engine.scheduler.add(make_sequence(3))
        engine.scheduler.cancel(3)
        engine.scheduler.add(make_sequence(3))

    @pytest.mark.parametrize("num_tokens", [0, 257])
    def test_a_sequence_must_have_tokens_and_fit(self, num_tokens: int) -> None:
        with pytest.raises(ValueError, match=f"has {num_tokens} tokens"):
            make_engine().add(prompt=num_tokens)


class TestConfiguration:
    def test_a_sequence_of_max_model_len_must_fit_the_cache(self) -> None:
        with pytest.raises(ConfigurationError, match="max_model_len is 65, but the KV cache holds 64 tokens"):
            Scheduler(SchedulerConfig(max_model_len=65), BlockPool(4, 16), FakeTiers())

    @pytest.mark.parametrize(
        ("name", "value"),
        [("max_batched_tokens", 0), ("max_batch_ranks", 0), ("max_model_len", -1), ("generated_weight", -1.0)],
    )
    def test_a_bound_that_lets_nothing_run_is_refused(self, name: str, value: float) -> None:
        with pytest.raises(ConfigurationError, match=name):
            make_engine(**{name: value})


class TestAdapters:
    def test_a_loading_adapter_blocks_nobody(self) -> None:
        engine = make_engine(FakeTiers(slow_loads=True))
        engine.tiers.host.add(("here", "r1"))
        slow = [engine.add("slow", priority=5) for _ in range(3)]
        here, base = engine.add("here"), engine.add()
        assert given(engine.step()) == {3: 4, 4: 4}
        run_until_finished(engine, here)
        run_until_finished(engine, base)
        assert all(sequence.status is SequenceStatus.WAITING for sequence in slow)
        assert given(engine.step()) == {}
        engine.tiers.end_load(("slow", "r1"))
        engine.scheduler.adapter_loaded(("slow", "r1"))
        assert given(engine.step()) == {0: 4, 1: 4, 2: 4}

    def test_an_adapter_that_fails_takes_only_its_own_along(self) -> None:
        engine = make_engine(FakeTiers(slow_loads=True))
        bad, good, other = engine.add("bad"), engine.add("good"), engine.add("bad", revision="r2")
        engine.tiers.loading.clear()
        assert engine.scheduler.adapter_failed(("bad", "r1")) == [bad]
        assert bad.status is SequenceStatus.FINISHED
        assert engine.scheduler.adapter_failed(("bad", "r1")) == []
        for sequence in (good, other):
            engine.tiers.host.add(sequence.adapter_key)
            engine.scheduler.adapter_loaded(sequence.adapter_key)
        assert given(engine.step()) == {1: 4, 2: 4}

    def test_an_adapter_evicted_from_the_host_before_its_turn_is_loaded_again(self) -> None:
        engine = make_engine(FakeTiers(slow_loads=True))
        engine.tiers.host |= {("a", "r1"), ("b", "r1")}
        engine.add("a")
        engine.add("b")
        engine.tiers.host.remove(("a", "r1"))
        assert given(engine.step()) == {1: 4}
        assert ("a", "r1") in engine.tiers.loading
        engine.drain(20)

    def test_a_load_that_ended_between_rank_and_the_event_is_not_missed(self) -> None:
        engine = make_engine(FakeTiers(slow_loads=True))
        engine.add("a")
        engine.tiers.end_load(("a", "r1"))
        engine.add("a")
        assert given(engine.step()) == {0: 4, 1: 4}
        engine.scheduler.adapter_loaded(("a", "r1"))
        engine.drain(20)

    def test_ranks_of_distinct_adapters_are_bounded(self) -> None:
        engine = make_engine(FakeTiers(ranks={"a": 8, "b": 16, "c": 8, "d": 1}), max_batch_ranks=24)
        for adapter_id in "abcda":
            engine.add(adapter_id)
        engine.add()
        assert given(engine.step()).keys() == {0, 1, 4, 5}, "the same adapter again and the base model cost nothing"
        engine.drain(50)

    def test_an_adapter_beyond_the_sum_of_ranks_runs_alone(self) -> None:
        engine = make_engine(FakeTiers(ranks={"huge": 64}), max_batch_ranks=24, residency_quantum=0.0)
        small = [engine.add("small") for _ in range(2)]
        huge = engine.add("huge")
        later = [engine.add("small") for _ in range(2)]
        run_until_finished(engine, huge)
        assert [s in engine.finished for s in (*small, *later)] == [True, False, False, False]
        engine.drain(50)

    def test_pins_are_bounded_by_the_slots_of_the_pool(self) -> None:
        engine = make_engine(FakeTiers(slots=2))
        for number in range(20):
            engine.add("abcde"[number % 5])
        engine.drain(200)
        assert len(engine.finished) == 20

    def test_riders_fill_the_batch_when_no_room_is_left_for_others(self) -> None:
        engine = make_engine(FakeTiers(slots=1), max_skipped=2, max_batch_sequences=8)
        engine.add("a", new=30)
        engine.step()
        for adapter_id in "bcdef":
            engine.add(adapter_id)
        riders = [engine.add("a"), engine.add()]
        step = engine.step()
        assert given(step).keys() == {0, *(rider.sequence_id for rider in riders)}


class TestReserve:
    @staticmethod
    def stream_of_small_ones(engine: FakeEngine, big: Sequence, max_steps: int) -> int:
        """Small adapters keep coming; steps until the big one starts."""
        for number in range(max_steps):
            while engine.scheduler.num_waiting < 6:
                engine.add(f"small-{number}-{engine.scheduler.num_waiting}", prompt=4, new=8)
            engine.step()
            if big.first_scheduled_at is not None:
                return number
        raise AssertionError("the adapter of high rank starves")

    @pytest.mark.parametrize(("quantum", "bound"), [(0.0, 12), (200.0, 30), (2000.0, 250)])
    def test_an_adapter_of_high_rank_does_not_starve_behind_small_ones(self, quantum: float, bound: int) -> None:
        tiers = FakeTiers(ranks={"big": 32})
        engine = make_engine(tiers, max_batch_ranks=32, residency_quantum=quantum)
        engine.add("small")
        engine.step()
        assert self.stream_of_small_ones(engine, engine.add("big"), bound) > (quantum / 200)

    def test_an_adapter_does_not_starve_for_a_slot_behind_a_flood(self) -> None:
        engine = make_engine(FakeTiers(slots=1), residency_quantum=100.0, max_batch_sequences=4)
        for _ in range(300):
            engine.add("flood", prompt=4, new=8)
        engine.step()
        light = engine.add("light")
        assert run_until_finished(engine, light) < 40

    def test_what_cannot_have_room_even_in_an_empty_batch_stops_nobody(self) -> None:
        class FullPool(FakeTiers):
            def acquire(self, key: tuple[str, str]) -> bool:
                return key[0] != "never" and super().acquire(key)

        engine = make_engine(FullPool(), residency_quantum=10.0)
        engine.add("never")
        others = [engine.add("other", prompt=4, new=4) for _ in range(10)]
        for sequence in others:
            run_until_finished(engine, sequence)


class TestPreemption:
    def test_the_last_of_the_most_served_adapter_goes_and_comes_back(self) -> None:
        engine = make_engine(num_blocks=9, max_model_len=36)
        first, second = engine.add("greedy", prompt=8, new=8), engine.add("greedy", prompt=8, new=8)
        engine.step()
        modest = engine.add("modest", prompt=4, new=8)
        preempted = [sequence for _ in range(8) for sequence in engine.step().preempted]
        assert preempted[0] is second
        assert second.num_preemptions == 1
        engine.drain(100)
        assert all(s.generated_token_ids == list(range(8)) for s in (first, second, modest))

    def test_tokens_read_again_are_not_charged_again(self) -> None:
        engine = make_engine(num_blocks=8, max_model_len=32)
        for _ in range(4):
            engine.add("a", prompt=7, new=12)
        engine.drain(200)
        assert engine.num_preemptions > 0
        assert engine.services["a"] == 4 * (7 + 2 * 12)
        assert engine.scheduler.queue.counter("a") == engine.services["a"]

    @pytest.mark.parametrize("max_batched_tokens", [3, 8, 64])
    def test_a_tiny_cache_still_finishes_everything(self, max_batched_tokens: int) -> None:
        engine = make_engine(FakeTiers(slots=2), num_blocks=10, max_model_len=40, max_batched_tokens=max_batched_tokens)
        for number in range(30):
            engine.add("abc"[number % 3], prompt=1 + number % 17, new=1 + number % 23)
        engine.drain(5000)
        assert len(engine.finished) == 30
        assert engine.num_preemptions > 0 or max_batched_tokens == 3
        for sequence in engine.finished:
            assert len(sequence.generated_token_ids) == sequence.sampling.max_new_tokens

    @pytest.mark.parametrize("prompt", [30, 40])
    def test_a_sequence_as_long_as_the_cache_finishes(self, prompt: int) -> None:
        engine = make_engine(num_blocks=10, max_model_len=40)
        long = engine.add("a", prompt=prompt, new=100)
        for _ in range(5):
            engine.add("b", prompt=6, new=12)
        engine.drain(1000)
        assert long.num_tokens == 41, "the last token is sampled from a full cache"

    def test_an_admission_leaves_a_block_to_those_who_decode(self) -> None:
        engine = make_engine(num_blocks=10, max_model_len=40)
        engine.add("a", prompt=20, new=8)
        engine.add("b", prompt=20, new=8)
        assert given(engine.step()).keys() == {0}, "both would fit, to the last block"
        engine.drain(100)
        assert engine.num_preemptions == 0


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of arrivals, loads, failures, evictions, cancels, deadlines and steps keeps every bound; all ends."""

    adapters = st.sampled_from(["a", "b", "c", "d", "e", "huge", None])

    @initialize(
        num_blocks=st.integers(8, 40),
        slots=st.integers(1, 4),
        max_batched_tokens=st.integers(1, 24),
        max_batch_sequences=st.integers(1, 8),
        residency_quantum=st.sampled_from([0.0, 50.0, 1e4]),
        max_skipped=st.integers(1, 4),
    )
    def start(self, num_blocks: int, slots: int, **values: float) -> None:
        self.tiers = FakeTiers(slots, {"a": 2, "b": 4, "c": 8, "d": 16, "huge": 40}, slow_loads=True)
        config = SchedulerConfig(max_model_len=32, max_batch_ranks=24, **values)  # type: ignore[arg-type]
        self.engine = FakeEngine(config, num_blocks=num_blocks, tiers=self.tiers)
        self.clock = 0.0

    @rule(
        adapter_id=adapters,
        revision=st.sampled_from(["r1", "r1", "r2"]),
        prompt=st.integers(1, 32),
        new=st.integers(1, 20),
        priority=st.integers(-1, 1),
        patience=st.none() | st.floats(1.0, 60.0),
        copies=st.integers(1, 4),
    )
    def add(self, patience: float | None, copies: int, **values: object) -> None:
        deadline = None if patience is None else self.clock + patience
        for _ in range(copies):
            self.engine.add(**values, deadline=deadline)  # type: ignore[arg-type]

    @rule(num_steps=st.integers(1, 6))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.engine.step()

    @precondition(lambda self: self.tiers.loading)
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(list(self.tiers.loading)))
        self.tiers.end_load(key)
        self.engine.scheduler.adapter_loaded(key)

    @precondition(lambda self: self.tiers.loading)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(list(self.tiers.loading)))
        del self.tiers.loading[key]
        for sequence in self.engine.scheduler.adapter_failed(key):
            assert sequence.adapter_key == key
            assert sequence.status is SequenceStatus.FINISHED

    @precondition(lambda self: self.tiers.host)
    @rule(data=st.data())
    def evict_from_host(self, data: st.DataObject) -> None:
        self.tiers.host.remove(data.draw(st.sampled_from(sorted(self.tiers.host))))

    @precondition(lambda self: self.engine.sequences)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        sequence = data.draw(st.sampled_from(list(self.engine.sequences.values())))
        was_there = sequence.status is not SequenceStatus.FINISHED
        assert self.engine.scheduler.cancel(sequence.sequence_id) is (sequence if was_there else None)

    @rule(seconds=st.floats(0.0, 30.0))
    def expire(self, seconds: float) -> None:
        self.clock += seconds
        due = {
            s.sequence_id
            for s in self.engine.sequences.values()
            if s.status is not SequenceStatus.FINISHED and s.deadline is not None and s.deadline <= self.clock
        }
        expired = {s.sequence_id for s in self.engine.scheduler.expire(self.clock)}
        assert due <= expired
        for sequence_id in expired - due:  # given up early: a step takes a second here, and it needs too many
            sequence = self.engine.sequences[sequence_id]
            steps = -(-sequence.num_tokens // self.engine.config.max_batched_tokens)
            assert sequence.deadline is not None
            assert sequence.deadline < self.clock + steps

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        tokens = sum(s.num_prompt_tokens + s.sampling.max_new_tokens for s in self.engine.sequences.values())
        self.engine.drain(10 * tokens + 100)
        for sequence in self.engine.finished:
            room = 32 - sequence.num_prompt_tokens + 1
            assert len(sequence.generated_token_ids) == min(sequence.sampling.max_new_tokens, room)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
