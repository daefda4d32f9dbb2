"""The scheduler: `schedule` makes a step, `advance` notes that it was computed."""

from __future__ import annotations

from loramux_worker.engine.kv_cache import BlockPool
from loramux_worker.engine.protocol import AdapterStats
from loramux_worker.engine.sequence import Sequence, SequenceStatus
from loramux_worker.errors import ConfigurationError
from loramux_worker.scheduler.admission import Admission
from loramux_worker.scheduler.allowances import Allowances
from loramux_worker.scheduler.batch import Batch, Seat
from loramux_worker.scheduler.config import SchedulerConfig
from loramux_worker.scheduler.deadlines import Deadlines, StepClock
from loramux_worker.scheduler.fair_queue import FairQueue
from loramux_worker.scheduler.ledger import ServiceLedger
from loramux_worker.scheduler.policy import Policies
from loramux_worker.scheduler.service_meter import ServiceMeter
from loramux_worker.scheduler.step import Chunk, Step, StepDraft
from loramux_worker.scheduler.tiers import AdapterKey, AdapterTiers

__all__ = ["AdapterTiers", "Chunk", "Scheduler", "SchedulerConfig", "Step"]


class Scheduler:
    """Gives each step's tokens to sequences, fairly between adapters, until `num_computed_tokens` catches up.

    Running sequences come first: a token for each that decodes, then chunks of prompts. What is left of the step
    goes to waiting sequences of the least-served adapters. One call costs O(running + admitted + `max_skipped`)
    times the logarithm of what waits; nothing is done for those that wait.

    An adapter for which there is no room now is passed over, for about `residency_quantum` of service; then nobody
    behind it is admitted until enough of the batch has finished. So it waits no longer than the batch takes to end.

    When the KV cache runs out, the last sequence of the most-served adapter is preempted: it loses its blocks,
    keeps its tokens, and computes them again later. The last to preempt another in a step samples a token in it, and
    a sequence that is alone finds a block, for none is longer than the cache: so every sequence ends.

    The engine appends what was sampled to `generated_token_ids`, and must `finish` a sequence that has more than
    `max_model_len` tokens, the last one sampled included. It may append a placeholder, schedule the next step, and
    put the token in its place after that: a step that preempts admits nobody, so a sequence that was preempted with
    a placeholder comes back in the step after it at the earliest, and by then must have the token. A sequence that
    has its `most_tokens`, placeholders counted, is in no further step, and keeps what it holds until it is finished.
    """

    def __init__(
        self, config: SchedulerConfig, blocks: BlockPool, adapters: AdapterTiers, policies: Policies | None = None
    ) -> None:
        if config.max_model_len > blocks.num_token_slots:
            raise ConfigurationError(
                f"max_model_len is {config.max_model_len}, but the KV cache holds {blocks.num_token_slots} "
                "tokens: lower max_model_len or raise kv_cache_memory"
            )
        self.config = config
        self.queue = FairQueue(policies)
        self._adapters = adapters
        adapters.follow(self.queue)
        self._block_size = blocks.block_size
        self._batch = Batch(config, blocks, adapters)
        self._meter = ServiceMeter(config)
        self._allowances = Allowances(config.max_model_len)
        self._ledger = ServiceLedger(self.queue)
        self._admission = Admission(config, self.queue, self._batch, self._meter, self._allowances, self._ledger)
        self._sequences: dict[int, Sequence] = {}
        self._clock = StepClock()
        self._deadlines = Deadlines(self._clock, config.max_batched_tokens)
        self._arrived: list[AdapterKey] = []

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return len(self._batch)

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for room or for their adapter."""
        return len(self.queue)

    @property
    def num_batch_adapters(self) -> int:
        """Distinct adapters of the running sequences."""
        return len(self._batch.ranks.adapters)

    @property
    def batch_ranks(self) -> int:
        """Sum of the ranks of those adapters."""
        return self._batch.ranks.used

    def add(self, sequence: Sequence) -> None:
        """Let a sequence wait for its turn; asks for the load of its adapter.

        Raises ValueError when its id is here already, or when it has no token or more than `max_model_len`.
        """
        if sequence.sequence_id in self._sequences:
            raise ValueError(f"sequence {sequence.sequence_id} was added twice")
        if not 0 < sequence.num_tokens <= self.config.max_model_len:
            raise ValueError(f"sequence {sequence.sequence_id} has {sequence.num_tokens} tokens")
        key = sequence.adapter_key
        if key is not None and self._adapters.rank(key) is None:
            self.queue.park(key)
        else:
            sequence.adapter_ready_at = sequence.submitted_at
            if key is not None and self.queue.is_parked(key):
                self._arrived.append(key)
        self._sequences[sequence.sequence_id] = sequence
        self.queue.push(sequence)
        self._ledger.arrived(None if key is None else key[0])
        self._deadlines.add(sequence)

    def adapter_loaded(self, key: AdapterKey) -> None:
        """A load that `AdapterTiers.rank` asked for ended well: its sequences may run from the next step on."""
        self._arrived.append(key)

    def adapter_failed(self, key: AdapterKey) -> list[Sequence]:
        """A load ended badly: forget the sequences that wait for it, and return them. Those that run go on."""
        failed = self.queue.waiting(key)
        for sequence in failed:
            self.finish(sequence)
        return failed

    def cancel(self, sequence_id: int) -> Sequence | None:
        """Forget a sequence in any state, and return it; None when there is none of this id."""
        sequence = self._sequences.get(sequence_id)
        if sequence is not None:
            self.finish(sequence)
        return sequence

    def finish(self, sequence: Sequence) -> None:
        """Forget a sequence in any state; its blocks are free, its adapter unpinned. A second time does nothing."""
        if self._sequences.get(sequence.sequence_id) is not sequence:
            return
        if sequence.status is SequenceStatus.RUNNING:
            self._ledger.collect(self._batch.seats[sequence.sequence_id].client)
            self._batch.leave(sequence)
        sequence.status = SequenceStatus.FINISHED
        self.queue.remove(sequence)
        self._meter.forget(sequence)
        del self._sequences[sequence.sequence_id]
        self._allowances.give_back(sequence)
        self._deadlines.remove(sequence)

    def expire(self, now_unix: float) -> list[Sequence]:
        """Forget the sequences, in any state, that cannot end before their deadline (Unix time, seconds).

        That is when it is over, or when the steps that a sequence needs at least would take longer. Returns them.
        """
        expired = []
        while (sequence := self._deadlines.late(now_unix)) is not None:
            self.finish(sequence)
            expired.append(sequence)
        return expired

    def schedule(self, now: float) -> Step:
        """Make the next step; `now` is in seconds on the monotonic clock.

        Call `advance` with it before the next call. A step without chunks means that nothing can run before an
        adapter arrives or a sequence that has its `most_tokens` is finished.
        """
        self._unpark_arrived(now)
        for adapter_id in self._allowances.released(now):
            self.queue.release(adapter_id)
        draft = StepDraft(self.config.max_batched_tokens)
        self._continue_running(draft)
        if not draft.preempted:  # what was just freed is for those who needed it
            self._admission.fill(draft, now)
        self._clock.tick(now, bool(draft.chunks))
        return draft.step()

    def advance(self, step: Step) -> None:
        """The step was computed: its tokens lie in the cache. Sequences that ended meanwhile are passed by."""
        for sequence, num_tokens in step.chunks:
            if sequence.status is SequenceStatus.RUNNING:
                sequence.num_computed_tokens += num_tokens

    def adapter_stats(self) -> list[AdapterStats]:
        """How each adapter fares, under a bounded number of labels. Costs O(running + labels)."""
        return self._ledger.stats(seat.client for seat in self._batch.seats.values())

    def check_integrity(self) -> None:
        """Raise AssertionError unless all is in order. Walks over everything: for tests and idle times."""
        self._batch.check_integrity()
        self.queue.check_integrity()
        assert len(self._sequences) == self.num_running + self.num_waiting
        assert len(self._deadlines) == sum(s.deadline is not None for s in self._sequences.values())
        for sequence in self._sequences.values():
            if sequence.sequence_id not in self._batch.seats:
                assert sequence.status is SequenceStatus.WAITING
                assert not sequence.block_table, "a sequence that waits holds blocks"
                assert not sequence.num_computed_tokens

    def _unpark_arrived(self, now: float) -> None:
        for key in self._arrived:
            for sequence in self.queue.unpark(key):
                if sequence.adapter_ready_at is None:
                    sequence.adapter_ready_at = now
        self._arrived.clear()

    def _continue_running(self, draft: StepDraft) -> None:
        """A token for each sequence that decodes, then chunks for the others in fair order; and charge for both.

        The first loop is most of what a step costs here: hence no calls in it.
        """
        block_size, decoding, prefilling = self._block_size, [], []
        for seat in list(self._batch.seats.values()):
            sequence = seat.sequence
            num_tokens = len(sequence.prompt_token_ids) + len(sequence.generated_token_ids)
            num_uncomputed = num_tokens - sequence.num_computed_tokens
            if num_uncomputed > 1:
                prefilling.append(seat)
            elif (
                num_uncomputed == 1
                and num_tokens < sequence.most_tokens
                and (num_tokens <= len(sequence.block_table) * block_size or self._make_room(sequence, draft))
            ):
                decoding.append(seat)
        if draft.preempted:
            decoding = [seat for seat in decoding if seat.sequence.status is SequenceStatus.RUNNING]
            prefilling = [seat for seat in prefilling if seat.sequence.status is SequenceStatus.RUNNING]
        draft.chunks.extend([seat.chunk for seat in decoding])
        draft.tokens_left -= len(decoding)
        self._meter.charge_decodes(decoding)
        for seat in sorted(prefilling, key=self._fair_order):
            self._meter.charge_chunk(seat.client, seat.sequence, draft.give(seat.sequence))

    def _make_room(self, sequence: Sequence, draft: StepDraft) -> bool:
        """Preempt until the sequence has a block for its next token. False: it is among those who had to go."""
        while sequence.status is SequenceStatus.RUNNING:
            if self._batch.grow(sequence):
                return True
            self._preempt(max(self._batch.seats.values(), key=self._fair_order).sequence, draft)
        return False

    def _preempt(self, sequence: Sequence, draft: StepDraft) -> None:
        self._meter.preempt(sequence)
        self._batch.leave(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_preemptions += 1
        self.queue.requeue(sequence)
        draft.preempted.append(sequence)

    def _fair_order(self, seat: Seat) -> tuple[float, tuple[int, int, int]]:
        """The least for the running sequence whose turn is first."""
        return seat.client.counter, self.queue.order(seat.sequence)
