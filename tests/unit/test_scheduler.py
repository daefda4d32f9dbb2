from __future__ import annotations

import pytest

from loramux_worker.engine.kv_cache import BlockPool
from loramux_worker.engine.sequence import SequenceStatus
from loramux_worker.errors import ConfigurationError
from loramux_worker.scheduler import Scheduler, SchedulerConfig
from unit.scheduler_support import FakeTiers, given, make_engine, make_sequence


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
