"""Which sequences cannot end before their deadlines."""

from __future__ import annotations

from collections import deque

from loramux_worker.engine.sequence import Sequence
from loramux_worker.scheduler.removable_heap import RemovableHeap

_BLOCK_STEPS = 16
_REMEMBERED_BLOCKS = 8


class StepClock:
    """How long a step takes at least: the shortest mean of 16 steps in a row, of the last 128. 0: not known yet.

    Means, because single steps may be scheduled in quick succession while the device still runs an earlier one.
    """

    def __init__(self) -> None:
        self.least_seconds = 0.0
        self._means: deque[float] = deque(maxlen=_REMEMBERED_BLOCKS)
        self._block_began = 0.0
        self._steps = -1  # in this block; -1: none was begun

    def tick(self, now: float, has_chunks: bool) -> None:
        """A step is made at `now`; one without chunks, after which time means nothing, ends a row."""
        if not has_chunks:
            self._steps = -1
            return
        self._steps += 1
        if self._steps in (0, _BLOCK_STEPS):
            if self._steps:
                self._means.append((now - self._block_began) / _BLOCK_STEPS)
                self.least_seconds = min(self._means)
            self._block_began, self._steps = now, 0


class Deadlines:
    """Sequences by the time from which they are late, even if every step from now on has room for them."""

    def __init__(self, clock: StepClock, max_batched_tokens: int) -> None:
        self._clock = clock
        self._max_batched_tokens = max_batched_tokens
        self._sequences: RemovableHeap[Sequence] = RemovableHeap()

    def __len__(self) -> int:
        return len(self._sequences)

    def add(self, sequence: Sequence) -> None:
        """Watch a sequence, if it has a deadline."""
        if sequence.deadline is not None:
            self._sequences.push(sequence, (self._late_from(sequence),))

    def remove(self, sequence: Sequence) -> None:
        """The sequence ended, whether it was watched or not."""
        if sequence in self._sequences:
            self._sequences.remove(sequence)

    def late(self, now_unix: float) -> Sequence | None:
        """A sequence that cannot end in time; it is watched on until it is removed."""
        while self._sequences and self._sequences.first()[0][0] <= now_unix:
            sequence = self._sequences.first()[1]
            late_from = self._late_from(sequence)
            if late_from <= now_unix:
                return sequence
            self._sequences.remove(sequence)  # it has come on, or steps are faster now
            self._sequences.push(sequence, (late_from,))
        return None

    def _late_from(self, sequence: Sequence) -> float:
        assert sequence.deadline is not None
        prompt_steps = -(-sequence.num_uncomputed_tokens // self._max_batched_tokens)
        more_tokens = sequence.fewest_tokens - len(sequence.generated_token_ids)
        return sequence.deadline - self._clock.least_seconds * max(0, prompt_steps - 1 + more_tokens)
