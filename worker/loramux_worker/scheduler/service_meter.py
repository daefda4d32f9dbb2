"""What the tokens of a step count for in the fair queue."""

from __future__ import annotations

from collections.abc import Iterable

from loramux_worker.engine.sequence import Sequence
from loramux_worker.scheduler.batch import Seat
from loramux_worker.scheduler.client import Client
from loramux_worker.scheduler.config import SchedulerConfig


class ServiceMeter:
    """Counts service in weighted tokens: the prompt tokens that are read and the tokens that are sampled.

    A prompt token counts once, however often preemption makes the model read it again; reading a generated token
    counts nothing, for it counted when it was sampled.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self._prompt_weight = config.prompt_weight
        self._generated_weight = config.generated_weight
        self._max_model_len = config.max_model_len
        self._counted_prompts: dict[int, int] = {}

    def service(self, sequence: Sequence, num_tokens: int) -> float:
        """Weighted tokens of the sequence's next `num_tokens` tokens. To be asked before they are computed."""
        start = sequence.num_computed_tokens
        end = start + num_tokens
        num_prompt_tokens = len(sequence.prompt_token_ids)
        service = self._generated_weight if end == sequence.num_tokens else 0.0
        if start < num_prompt_tokens:
            start = max(start, self._counted_prompts.get(sequence.sequence_id, 0))
            service += self._prompt_weight * max(0, min(end, num_prompt_tokens) - start)
        return service

    def charge_chunk(self, client: Client, sequence: Sequence, num_tokens: int) -> None:
        """Charge a client for the sequence's next tokens, of which there may be none."""
        if num_tokens:
            client.charge(self.service(sequence, num_tokens))

    def charge_decodes(self, seats: Iterable[Seat]) -> None:
        """Charge the clients of sequences that each read their last known token and sample the next."""
        generated_weight = self._generated_weight
        for seat in seats:
            client = seat.client
            if seat.sequence.generated_token_ids:
                client.counter += generated_weight / client.weight
            else:
                client.charge(self.service(seat.sequence, 1))

    def most_service(self, sequence: Sequence) -> float:
        """Weighted tokens that the whole sequence can count for at most."""
        num_prompt_tokens = sequence.num_prompt_tokens
        num_generated = min(sequence.sampling.max_new_tokens, self._max_model_len - num_prompt_tokens + 1)
        return self._prompt_weight * num_prompt_tokens + self._generated_weight * num_generated

    def preempt(self, sequence: Sequence) -> None:
        """Remember what counted before the sequence loses its computed tokens."""
        counted = min(sequence.num_computed_tokens, sequence.num_prompt_tokens)
        before = self._counted_prompts.get(sequence.sequence_id, 0)
        self._counted_prompts[sequence.sequence_id] = max(counted, before)

    def forget(self, sequence: Sequence) -> None:
        """The sequence ended."""
        self._counted_prompts.pop(sequence.sequence_id, None)
