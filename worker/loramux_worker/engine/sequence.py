"""A sequence: a request inside the engine."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from enum import Enum

from loramux_worker.engine.protocol import AdapterReference, SamplingParameters

PENDING_TOKEN = -1
"""Stands in `generated_token_ids` for a token that the device has been told to sample and nobody has read yet."""


class SequenceStatus(Enum):
    """Where a sequence is. A preempted sequence is WAITING again, with the tokens it has."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(eq=False, slots=True)
class Sequence:
    """Prompt and generated token ids, and how far the model has read them.

    `num_computed_tokens` counts the tokens whose keys and values lie in the blocks of `block_table`. The model runs
    over `token_ids[num_computed_tokens:]`, a chunk a step; when it has caught up, the next token is sampled. There
    is no prefill phase and no decode phase beyond that.

    Of a running sequence at most the last tokens are `PENDING_TOKEN`s, one for each step in flight that samples for
    it; a chunk that reads one is that one token. A waiting sequence is not scheduled before it has none.
    """

    sequence_id: int
    prompt_token_ids: list[int]
    sampling: SamplingParameters
    adapter: AdapterReference | None = None
    priority: int = 0
    deadline: float | None = None  # Unix time, seconds
    generated_token_ids: list[int] = field(default_factory=list)
    most_tokens: int = sys.maxsize
    """With so many tokens, prompt + generated, it ends: once it has them, read or not, it is not to run again."""

    fewest_tokens: int = 1
    """Generated tokens before which it cannot end."""

    is_plain: bool = field(init=False)  # greedy and nothing more: sampling it takes an argmax
    status: SequenceStatus = SequenceStatus.WAITING
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    num_preemptions: int = 0

    # seconds on the monotonic clock, for `timing` in the reply
    submitted_at: float = 0.0
    adapter_ready_at: float | None = None
    first_scheduled_at: float | None = None
    first_token_at: float | None = None

    def __post_init__(self) -> None:
        p = self.sampling
        self.is_plain = (
            p.temperature == 0.0
            and p.repetition_penalty == 1.0
            and p.presence_penalty == p.frequency_penalty == 0.0
            and not p.min_new_tokens
            and p.logprobs is None
        )

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt."""
        return len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Tokens known so far: prompt + generated."""
        return len(self.prompt_token_ids) + len(self.generated_token_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Known tokens that the model has not read yet; 1 while decoding."""
        return self.num_tokens - self.num_computed_tokens

    @property
    def adapter_key(self) -> tuple[str, str] | None:
        """(adapter_id, revision), or None for the base model."""
        return None if self.adapter is None else self.adapter.key

    def tokens(self, start: int, end: int) -> list[int]:
        """Token ids `start` to `end` (exclusive) of prompt + generated, `PENDING_TOKEN` where not read yet."""
        split = len(self.prompt_token_ids)
        if end <= split:
            return self.prompt_token_ids[start:end]
        if start >= split:
            return self.generated_token_ids[start - split : end - split]
        return self.prompt_token_ids[start:] + self.generated_token_ids[: end - split]
