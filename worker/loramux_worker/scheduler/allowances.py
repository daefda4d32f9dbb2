"""Tokens a second, for adapters that are limited to them."""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import count

from loramux_worker.engine.sequence import Sequence
from loramux_worker.scheduler.client import Client

_BURST = 1.0  # seconds' worth of tokens that an adapter may have saved up


class Allowances:
    """Token buckets, each as the time at which its adapter will have paid for all it took.

    A sequence takes all the tokens that it may come to when it is admitted, and at its end gives back what it did
    not use: so the limit holds also for what many sequences, admitted together, will generate. An adapter with
    something to pay is held: none of its sequences is admitted. One that took nothing for a while may take `_BURST`
    ahead, and always one whole sequence.
    """

    def __init__(self, max_model_len: int) -> None:
        self._max_model_len = max_model_len
        self._paid_at: dict[str | None, float] = {}
        self._taken: dict[int, tuple[Client, int]] = {}  # by sequence: tokens
        self._due: list[tuple[float, int, str | None]] = []  # a heap of when to look; some for nothing
        self._ties = count()

    def take(self, client: Client, sequence: Sequence, now: float) -> bool:
        """Count a sequence that is admitted, once; whether its adapter is to be held now."""
        rate = client.policy.tokens_per_second
        if rate is None:
            return False
        if sequence.sequence_id not in self._taken:
            most = min(sequence.num_prompt_tokens + sequence.sampling.max_new_tokens, self._max_model_len + 1)
            self._taken[sequence.sequence_id] = client, most
            paid_at = max(self._paid_at.get(client.adapter_id, 0.0), now - _BURST) + most / rate
            self._pay_at(client.adapter_id, paid_at)
        return self._paid_at.get(client.adapter_id, now) > now

    def give_back(self, sequence: Sequence) -> None:
        """The sequence ended."""
        taken = self._taken.pop(sequence.sequence_id, None)
        if taken is None:
            return
        client, most = taken
        paid_at, rate = self._paid_at.get(client.adapter_id), client.policy.tokens_per_second
        if paid_at is not None and rate is not None:
            self._pay_at(client.adapter_id, paid_at - max(0, most - sequence.num_tokens) / rate)

    def released(self, now: float) -> list[str | None]:
        """Adapters that have paid since the last call, whether they were held or not."""
        released = []
        while self._due and self._due[0][0] <= now:
            _, _, adapter_id = heappop(self._due)
            paid_at = self._paid_at.get(adapter_id)
            if paid_at is None:
                continue
            if paid_at <= now - _BURST:  # as if it had never taken anything
                del self._paid_at[adapter_id]
            if paid_at <= now:
                released.append(adapter_id)
        return released

    def _pay_at(self, adapter_id: str | None, paid_at: float) -> None:
        self._paid_at[adapter_id] = paid_at
        for due in (paid_at, paid_at + _BURST):
            heappush(self._due, (due, next(self._ties), adapter_id))
