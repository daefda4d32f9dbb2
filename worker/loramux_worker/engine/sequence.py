"""A sequence: a request inside the engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from loramux_worker.engine.protocol import AdapterReference, SamplingParameters


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
    """

    sequence_id: int
    prompt_token_ids: list[int]
    sampling: SamplingParameters
    adapter: AdapterReference | None = None
    priority: int = 0
    deadline: float | None = None  # Unix time, seconds
    generated_token_ids: list[int] = field(default_factory=list)

    status: SequenceStatus = SequenceStatus.WAITING
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    num_preemptions: int = 0

    # seconds on the monotonic clock, for `timing` in the reply
    submitted_at: float = 0.0
    adapter_ready_at: float | None = None
    first_scheduled_at: float | None = None
    first_token_at: float | None = None

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
        """Token ids `start` to `end` (exclusive) of prompt + generated."""
        split = len(self.prompt_token_ids)
        if end <= split:
            return self.prompt_token_ids[start:end]
        if start >= split:
            return self.generated_token_ids[start - split : end - split]
        return self.prompt_token_ids[start:] + self.generated_token_ids[: end - split]
