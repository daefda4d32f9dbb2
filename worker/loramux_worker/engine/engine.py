"""The engine: token ids in, token ids out. One step is schedule → launch → answer an earlier one."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable

from loramux_schemas import ErrorCode, FinishReason
from loramux_worker.adapters.residency import AdapterResidency
from loramux_worker.engine.in_flight import InFlightStep
from loramux_worker.engine.protocol import (
    Cancel,
    EngineMessage,
    Failed,
    FrontMessage,
    Outputs,
    Prefetch,
    SequenceOutput,
    SequenceTiming,
    Submit,
)
from loramux_worker.engine.runner import Runner
from loramux_worker.engine.sequence import Sequence, SequenceStatus
from loramux_worker.scheduler.scheduler import Scheduler, Step


class Engine:
    """Sequences, and the loop body that moves them on. Not thread-safe: one thread owns it.

    `emit` takes what the front is to hear. `pipeline_depth` is how many steps the device may have in hand while the
    next is made. 0 reads a step's tokens right after its launch: for a CPU, where a launched step is a finished one.
    With 1, step n + 1 is scheduled and launched while the device runs step n, and only then are the tokens of n read,
    the one wait for the device. Until then each stands in its sequence as a placeholder, which has consequences:

    - A sequence whose last token is in flight is in no further step (`Sequence.most_tokens`); one that turns out to
      have ended earlier was in one step too many, whose token is dropped.
    - A sequence preempted while step n + 1 was made has its token of step n before n + 2 is made, so it is never
      computed again from a placeholder. This is why the depth is 1 at most.
    - What ended may still be read and written by a step in flight: its blocks, its adapter's slot, its rows in the
      sampler. They are given to others at once, for what those do to them is enqueued behind that step.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        adapters: AdapterResidency,
        max_model_len: int,
        emit: Callable[[EngineMessage], None],
        *,
        pipeline_depth: int,
    ) -> None:
        assert pipeline_depth in (0, 1), "a preempted sequence must have its tokens before it can come back"
        self._scheduler = scheduler
        self._runner = runner
        self._adapters = adapters
        self._max_model_len = max_model_len
        self._emit = emit
        self._pipeline_depth = pipeline_depth
        self._in_flight: deque[InFlightStep] = deque()  # oldest first
        self._preempted: list[Sequence] = []  # since the last launch
        self._users: Counter[tuple[str, str]] = Counter()  # sequences of each adapter
        self.steps_total = 0
        self.preemptions_total = 0
        self.step_seconds_total = 0.0
        self.batch_sequences = 0
        self.batch_adapters = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence is here, be it that its adapter is still on its way, or any step is in flight."""
        return self._scheduler.num_running + self._scheduler.num_waiting > 0 or bool(self._in_flight)

    def handle(self, message: FrontMessage) -> None:
        """Take one message of the front."""
        match message:
            case Submit():
                self._submit(message)
            case Cancel():
                if (sequence := self._scheduler.cancel(message.sequence_id)) is not None:
                    self._forget(sequence)
            case Prefetch():
                self._adapters.prefetch(message.adapter)

    def step(self) -> bool:
        """Move the sequences on by one step; False when there was nothing to run and nothing to read."""
        self._take_loaded_adapters()
        for sequence in self._scheduler.expire(time.time()):
            self._fail(sequence, ErrorCode.DEADLINE_EXCEEDED, _lateness(sequence))
        started = time.monotonic()
        step = self._scheduler.schedule(started)
        self.preemptions_total += len(step.preempted)
        self._preempted += step.preempted
        if step.chunks:
            self._launch(step)
        elif self._in_flight:
            self._answer_oldest()
        else:
            return False
        while len(self._in_flight) > self._pipeline_depth:
            self._answer_oldest()
        self.step_seconds_total += time.monotonic() - started
        return True

    def _launch(self, step: Step) -> None:
        # a step may preempt and yet have no chunks, when all others have their last token in flight: it is never run
        step, self._preempted = Step(step.chunks, tuple(self._preempted)), []
        launched = self._runner.launch(step, self._in_flight[-1] if self._in_flight else None)
        self._scheduler.advance(step)
        launched.append_placeholders()
        self._in_flight.append(launched)
        self.steps_total += 1
        self.batch_sequences = len(step.chunks)
        self.batch_adapters = len({c.sequence.adapter_key for c in step.chunks} - {None})

    def _submit(self, message: Submit) -> None:
        sequence = Sequence(
            message.sequence_id,
            message.prompt_token_ids,
            message.sampling,
            message.adapter,
            message.priority,
            message.deadline,
            list(message.generated_token_ids),
            submitted_at=time.monotonic(),
        )
        if sequence.num_prompt_tokens >= self._max_model_len:
            self._emit(
                Failed(
                    sequence.sequence_id,
                    ErrorCode.CONTEXT_LENGTH_EXCEEDED,
                    f"the prompt has {sequence.num_prompt_tokens} tokens, "
                    f"the model takes {self._max_model_len - 1} and one more to generate",
                )
            )
            return
        most = min(sequence.num_prompt_tokens + message.sampling.max_new_tokens, self._max_model_len)
        sequence.most_tokens = max(most, sequence.num_tokens + 1)  # it is here to be given at least one
        sequence.fewest_tokens = min(message.fewest_tokens, sequence.most_tokens - sequence.num_prompt_tokens)
        if message.adapter is not None:
            self._adapters.expect(message.adapter)
            self._users[message.adapter.key] += 1
        self._scheduler.add(sequence)

    def _take_loaded_adapters(self) -> None:
        for loaded in self._adapters.poll():
            if loaded.error is None:
                self._scheduler.adapter_loaded(loaded.key)
            else:
                for sequence in self._scheduler.adapter_failed(loaded.key):
                    self._fail(sequence, loaded.error.code, loaded.error.message)

    def _answer_oldest(self) -> None:
        """Wait for the oldest step in flight and say what it sampled."""
        step = self._in_flight.popleft()
        tokens = step.tokens()
        now = time.monotonic()
        outputs: list[SequenceOutput] = []
        timings: list[SequenceTiming] = []
        for row, (sequence, token) in enumerate(zip(step.sequences, tokens, strict=True)):
            if sequence.status is SequenceStatus.FINISHED:  # while the step was in flight
                continue
            place = step.place(row)
            sequence.generated_token_ids[place] = token.token_id
            sequence.first_token_at = sequence.first_token_at or now
            reason = _finish_reason(sequence, place)
            outputs.append(SequenceOutput(sequence.sequence_id, token.token_id, reason, token.logprobs))
            if reason is not None:
                del sequence.generated_token_ids[place + 1 :]  # of a step too many
                timings.append(_timing(sequence, now))
                self._scheduler.finish(sequence)
                self._forget(sequence)
        if outputs:
            self._emit(Outputs(outputs, timings))

    def _fail(self, sequence: Sequence, code: str, message: str) -> None:
        self._forget(sequence)
        self._emit(Failed(sequence.sequence_id, code, message))

    def _forget(self, sequence: Sequence) -> None:
        """The scheduler has dropped it: let the other parts drop what they keep for it."""
        self._runner.forget(sequence)
        key = sequence.adapter_key
        if key is not None:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]
                self._adapters.forget(key)


def _lateness(sequence: Sequence) -> str:
    """Why a sequence was given up: its deadline is over, or known not to be met."""
    if sequence.deadline is not None and sequence.deadline > time.time():
        missing = sequence.fewest_tokens - len(sequence.generated_token_ids)
        return f"the deadline cannot be met: at least {missing} more tokens are to be generated"
    return "the deadline passed during generation"


def _finish_reason(sequence: Sequence, place: int) -> str | None:
    """Whether the sequence ends with its generated token at `place`, and why."""
    sampling, token_id = sequence.sampling, sequence.generated_token_ids[place]
    if token_id in sampling.stop_token_ids:
        return FinishReason.STOP_SEQUENCE
    if token_id in sampling.eos_token_ids and not sampling.ignore_eos:
        return FinishReason.EOS_TOKEN
    if sequence.num_prompt_tokens + place + 1 >= sequence.most_tokens:
        return FinishReason.LENGTH
    return None


def _timing(sequence: Sequence, now: float) -> SequenceTiming:
    """Where the seconds of a finished sequence went; waiting for the adapter is not counted as queueing."""
    submitted = sequence.submitted_at
    ready = sequence.adapter_ready_at or submitted
    scheduled = sequence.first_scheduled_at or now
    first_token = sequence.first_token_at or now
    return SequenceTiming(
        sequence.sequence_id,
        queue=max(0.0, scheduled - ready),
        adapter=ready - submitted,
        prefill=first_token - scheduled,
        decode=now - first_token,
    )
