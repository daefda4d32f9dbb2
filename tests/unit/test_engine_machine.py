"""The engine over a device of our own: any order of requests, cancels and steps gives each sequence its own tokens."""

from __future__ import annotations

import time

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from loramux_worker.adapters.residency import AdapterResidency
from loramux_worker.engine.engine import Engine
from loramux_worker.engine.in_flight import InFlightStep, pending_inputs
from loramux_worker.engine.kv_cache import BlockPool
from loramux_worker.engine.pending_sample import PendingSample
from loramux_worker.engine.protocol import Cancel, EngineMessage, Failed, Outputs, SamplingParameters, Submit
from loramux_worker.engine.runner import Runner
from loramux_worker.engine.sequence import PENDING_TOKEN, Sequence
from loramux_worker.scheduler import Scheduler, SchedulerConfig, Step
from unit.scheduler_support import FakeTiers

VOCAB = 16
EOS, STOP = 3, 4
MAX_MODEL_LEN = 24
BLOCK_SIZE = 4


def next_token(context: list[int]) -> int:
    """What the fake model says after these tokens."""
    state = 7
    for token in context:
        state = (state * 31 + token + 1) % 10_007
    return state % VOCAB


def answer(submission: Submit) -> list[int]:
    """All generated tokens, the ones it came with included."""
    generated = list(submission.generated_token_ids)
    while True:
        generated.append(next_token(submission.prompt_token_ids + generated))
        sampling = submission.sampling
        ended = generated[-1] in sampling.eos_token_ids + sampling.stop_token_ids
        full = len(submission.prompt_token_ids) + len(generated) >= MAX_MODEL_LEN
        if ended or full or len(generated) >= sampling.max_new_tokens:
            return generated


class FakeRunner(Runner):
    """A device whose KV cache holds the tokens themselves: it samples from what lies in a sequence's blocks.

    Like the real one it only takes note of blocks that a sequence has more than before.
    """

    def __init__(self, num_blocks: int) -> None:
        self.cache = [PENDING_TOKEN] * (num_blocks * BLOCK_SIZE)
        self.tables: dict[int, list[int]] = {}
        self.forgotten: list[int] = []
        self.sampled: list[int] = []  # in the last step that sampled

    def forget(self, sequence: Sequence) -> None:
        self.forgotten.append(sequence.sequence_id)
        self.tables.pop(sequence.sequence_id, None)

    def launch(self, step: Step, previous: InFlightStep | None) -> InFlightStep:
        for sequence in step.preempted:
            self.tables.pop(sequence.sequence_id, None)
        ids = [t for s, n in step.chunks for t in s.tokens(s.num_computed_tokens, s.num_computed_tokens + n)]
        for position, row in zip(*pending_inputs(step.chunks, previous), strict=True):
            assert previous is not None
            ids[position] = self.sampled[row]
        assert PENDING_TOKEN not in ids, "the model reads a placeholder"
        inputs = iter(ids)
        for sequence, num_tokens in step.chunks:
            assert sequence.num_tokens < sequence.most_tokens, "it is known to end with the token it has"
            table = self.tables.setdefault(sequence.sequence_id, [])
            table += sequence.block_table[len(table) :]
            for position in range(sequence.num_computed_tokens, sequence.num_computed_tokens + num_tokens):
                self.cache[self.slot(sequence, position)] = next(inputs)
        sampling = [chunk.sequence for chunk in step.chunks if chunk.samples]
        contexts = [[self.cache[self.slot(s, p)] for p in range(s.num_tokens)] for s in sampling]
        self.sampled = [next_token(context) for context in contexts]
        return InFlightStep(sampling, PendingSample(torch.tensor(self.sampled, dtype=torch.int64)))

    def slot(self, sequence: Sequence, position: int) -> int:
        return self.tables[sequence.sequence_id][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


class NoAdapters(AdapterResidency):
    def __init__(self) -> None:
        pass

    def poll(self) -> list:
        return []


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        depth=st.integers(0, 1),
        num_blocks=st.integers(6, 12),
        max_batched_tokens=st.integers(4, 24),
        max_batch_sequences=st.integers(2, 8),
    )
    def start(self, depth: int, num_blocks: int, **values: int) -> None:
        self.depth = depth
        config = SchedulerConfig(max_model_len=MAX_MODEL_LEN, **values)
        self.blocks = BlockPool(num_blocks, BLOCK_SIZE)
        self.scheduler = Scheduler(config, self.blocks, FakeTiers())
        self.runner = FakeRunner(num_blocks)
        self.engine = Engine(self.scheduler, self.runner, NoAdapters(), MAX_MODEL_LEN, self.hear, pipeline_depth=depth)
        self.submissions: dict[int, Submit] = {}
        self.tokens: dict[int, list[int]] = {}
        self.reasons: dict[int, str] = {}
        self.cancelled: set[int] = set()

    def hear(self, message: EngineMessage) -> None:
        assert isinstance(message, Outputs)
        for output in message.outputs:
            sequence_id = output.sequence_id
            assert sequence_id not in self.cancelled
            assert sequence_id not in self.reasons
            self.tokens[sequence_id].append(output.token_id)
            expected = answer(self.submissions[sequence_id])
            assert self.tokens[sequence_id] == expected[: len(self.tokens[sequence_id])]
            if output.finish_reason is not None:
                assert self.tokens[sequence_id] == expected
                self.reasons[sequence_id] = output.finish_reason
        ended = {o.sequence_id for o in message.outputs if o.finish_reason is not None}
        assert {timing.sequence_id for timing in message.timings} == ended

    @rule(
        prompt=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=9) | st.just([1] * (MAX_MODEL_LEN - 1)),
        new=st.integers(1, 3) | st.integers(8, 30),
        eos=st.booleans(),
        stop=st.booleans(),
        brought=st.integers(0, 6),
        copies=st.integers(1, 6),
    )
    def submit(self, prompt: list[int], new: int, eos: bool, stop: bool, brought: int, copies: int) -> None:
        sampling = SamplingParameters(new, eos_token_ids=(EOS,) if eos else (), stop_token_ids=(STOP,) if stop else ())
        for _ in range(copies):
            sequence_id = len(self.submissions)
            whole = Submit(sequence_id, prompt, sampling)
            had = answer(whole)[:-1][:brought]
            submission = Submit(sequence_id, prompt, sampling, generated_token_ids=had)
            self.submissions[sequence_id] = submission
            self.tokens[sequence_id] = list(had)
            self.engine.handle(submission)

    @rule(num_steps=st.integers(1, 5))
    def step(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.engine.step()
            self.scheduler.check_integrity()
            for sequence in self.scheduler._sequences.values():
                pending = sequence.generated_token_ids.count(PENDING_TOKEN)
                assert pending <= self.depth
                assert PENDING_TOKEN not in sequence.generated_token_ids[: -pending or None]

    @precondition(lambda self: self.submissions)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        sequence_id = data.draw(st.sampled_from(sorted(self.submissions)))
        self.engine.handle(Cancel(sequence_id))
        if sequence_id not in self.reasons:
            self.cancelled.add(sequence_id)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        most = 100 + 60 * MAX_MODEL_LEN * len(self.submissions)
        while self.engine.has_work:
            self.step(1)
            most -= 1
            assert most > 0, "the engine does not end"
        assert not self.engine.step()
        assert self.reasons.keys() == self.submissions.keys() - self.cancelled
        assert self.blocks.num_used == 0
        assert sorted(self.runner.forgotten) == sorted(self.submissions)


TestEngineMachine = EngineMachine.TestCase
TestEngineMachine.settings = settings(max_examples=200, stateful_step_count=25, deadline=None)


def test_a_deadline_that_cannot_be_met_is_answered_at_once_and_says_why() -> None:
    heard: list[EngineMessage] = []
    scheduler = Scheduler(SchedulerConfig(max_model_len=MAX_MODEL_LEN), BlockPool(12, BLOCK_SIZE), FakeTiers())
    engine = Engine(scheduler, FakeRunner(12), NoAdapters(), MAX_MODEL_LEN, heard.append, pipeline_depth=0)
    scheduler._clock.least_seconds = 10.0  # as if steps took so long
    sampling = SamplingParameters(16, ignore_eos=True)
    soon = time.time() + 60.0
    engine.handle(Submit(1, [5, 6], sampling, deadline=soon, fewest_tokens=16))
    engine.handle(Submit(2, [5, 6], sampling, deadline=soon))
    engine.handle(Submit(3, [5, 6], sampling, deadline=soon + 3600.0, fewest_tokens=16))
    engine.handle(Submit(4, [5, 6], sampling, deadline=soon - 61.0))
    engine.step()
    failed = {message.sequence_id: message for message in heard if isinstance(message, Failed)}
    assert failed.keys() == {1, 4}
    assert {message.code for message in failed.values()} == {"deadline_exceeded"}
    assert failed[1].message == "the deadline cannot be met: at least 16 more tokens are to be generated"
    assert failed[4].message == "the deadline passed during generation"
    assert scheduler.num_running == 2
