"""The engine: token ids in, token ids out. One step is schedule → run → answer."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from loramux_schemas import ErrorCode, FinishReason
from loramux_worker.adapters.residency import AdapterResidency
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
from loramux_worker.engine.runner import Runner, StepResult
from loramux_worker.engine.sampler import SampledToken
from loramux_worker.engine.sequence import Sequence
from loramux_worker.scheduler.scheduler import Scheduler


class Engine:
    """Sequences, and the loop body that moves them on. Not thread-safe: one thread owns it.

    `emit` takes what the front is to hear.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        adapters: AdapterResidency,
        max_model_len: int,
        emit: Callable[[EngineMessage], None],
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._adapters = adapters
        self._max_model_len = max_model_len
        self._emit = emit
        self._users: Counter[tuple[str, str]] = Counter()  # sequences of each adapter
        self.steps_total = 0
        self.preemptions_total = 0
        self.step_seconds_total = 0.0
        self.batch_sequences = 0
        self.batch_adapters = 0

    @property
    def has_work(self) -> bool:
        """Whether any sequence is here, be it that its adapter is still on its way."""
        return self._scheduler.num_running + self._scheduler.num_waiting > 0

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
        """Move the sequences on by one step; False when there was nothing to run."""
        self._take_loaded_adapters()
        for sequence in self._scheduler.expire(time.time()):
            self._fail(sequence, ErrorCode.DEADLINE_EXCEEDED, "the deadline passed during generation")
        started = time.monotonic()
        step = self._scheduler.schedule(started)
        if not step.chunks:
            return False
        result = self._runner.run(step)
        self._scheduler.advance(step)
        self._answer(result)
        self.steps_total += 1
        self.preemptions_total += len(step.preempted)
        self.step_seconds_total += time.monotonic() - started
        self.batch_sequences = len(step.chunks)
        self.batch_adapters = len({c.sequence.adapter_key for c in step.chunks} - {None})
        return True

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
        if message.adapter is not None:
            self._adapters.prefetch(message.adapter)
            self._users[message.adapter.key] += 1
        self._scheduler.add(sequence)

    def _take_loaded_adapters(self) -> None:
        for loaded in self._adapters.poll():
            if loaded.error is None:
                self._scheduler.adapter_loaded(loaded.key)
            else:
                for sequence in self._scheduler.adapter_failed(loaded.key):
                    self._fail(sequence, loaded.error.code, loaded.error.message)

    def _answer(self, result: StepResult) -> None:
        now = time.monotonic()
        outputs: list[SequenceOutput] = []
        timings: list[SequenceTiming] = []
        for sequence, token in zip(result.sequences, result.tokens, strict=True):
            sequence.generated_token_ids.append(token.token_id)
            sequence.first_token_at = sequence.first_token_at or now
            reason = self._finish_reason(sequence, token)
            outputs.append(SequenceOutput(sequence.sequence_id, token.token_id, reason, token.logprobs))
            if reason is not None:
                timings.append(_timing(sequence, now))
                self._scheduler.finish(sequence)
                self._forget(sequence)
        if outputs:
            self._emit(Outputs(outputs, timings))

    def _finish_reason(self, sequence: Sequence, token: SampledToken) -> str | None:
        sampling = sequence.sampling
        if token.token_id in sampling.stop_token_ids:
            return FinishReason.STOP_SEQUENCE
        if token.token_id in sampling.eos_token_ids and not sampling.ignore_eos:
            return FinishReason.EOS_TOKEN
        generated = len(sequence.generated_token_ids)
        if generated >= sampling.max_new_tokens or sequence.num_tokens >= self._max_model_len:
            return FinishReason.LENGTH
        return None

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
