"""The scheduler under any order of events."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from loramux_worker.engine.sequence import SequenceStatus
from loramux_worker.scheduler import SchedulerConfig
from unit.scheduler_support import FakeEngine, FakeTiers


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
