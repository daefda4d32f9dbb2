"""How the scheduler deals with where adapters are, and with their ranks."""

from __future__ import annotations

import pytest

from loramux_worker.engine.sequence import Sequence, SequenceStatus
from unit.scheduler_support import FakeEngine, FakeTiers, given, make_engine, run_until_finished


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
