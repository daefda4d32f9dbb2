"""A step: which sequences the next forward pass reads, and how far."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from loramux_worker.engine.sequence import Sequence


class Chunk(NamedTuple):
    """A step reads `tokens(num_computed_tokens, num_computed_tokens + num_tokens)` of the sequence."""

    sequence: Sequence
    num_tokens: int

    @property
    def samples(self) -> bool:
        """Whether the chunk reaches the last known token, so that the next is sampled. Ask before `advance`."""
        return self.num_tokens == self.sequence.num_uncomputed_tokens


@dataclass(frozen=True, slots=True)
class Step:
    """One forward pass: `chunks`, each of another sequence; `preempted` lost their blocks when it was made."""

    chunks: tuple[Chunk, ...]
    preempted: tuple[Sequence, ...]


class StepDraft:
    """A step in the making, and what is left of its token budget."""

    __slots__ = ("chunks", "preempted", "tokens_left")

    def __init__(self, max_tokens: int) -> None:
        self.tokens_left = max_tokens
        self.chunks: list[Chunk] = []
        self.preempted: list[Sequence] = []

    def give(self, sequence: Sequence) -> int:
        """Give the sequence a chunk, as many of its tokens as the step has left; how many those are."""
        num_tokens = min(sequence.num_uncomputed_tokens, self.tokens_left)
        if num_tokens:
            self.chunks.append(Chunk(sequence, num_tokens))
            self.tokens_left -= num_tokens
        return num_tokens

    def step(self) -> Step:
        """The step as it stands."""
        return Step(tuple(self.chunks), tuple(self.preempted))
