"""Which tokens a sequence has read or generated, for its penalties; kept on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from loramux_worker.engine.sequence import Sequence
from loramux_worker.engine.transfers import upload

_FIRST_SLOTS = 8


class TokenUsage:
    """A table [slots, vocabulary] with a row for each sequence that has penalties.

    An entry is twice the times the token was generated, plus one if it is in the prompt. Tokens are counted on the
    device when they are sampled, long before the host knows them; a row begins with what the host knows, and that is
    everything as long as nothing was sampled for the sequence here. So no token is missed or counted twice.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._device = device
        self._table = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._slots: dict[int, int] = {}
        self._free: list[int] = []

    @property
    def num_sequences(self) -> int:
        """Sequences that have a row."""
        return len(self._slots)

    def slot(self, sequence: Sequence) -> int:
        """The sequence's row; a new one counts its prompt and the generated tokens that it came with."""
        slot = self._slots.get(sequence.sequence_id)
        if slot is None:
            if not self._free:
                self._grow()
            slot = self._slots[sequence.sequence_id] = self._free.pop()
            (prompt, generated), _ = upload(self._device, [sequence.prompt_token_ids, sequence.generated_token_ids])
            self._table[slot].zero_().index_fill_(0, prompt, 1)
            self._count(torch.full_like(generated, slot), generated)
        return slot

    def read(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Rows of the table; `slots` is int64 [rows].

        Returns:
            seen bool [rows, vocabulary], in the prompt or generated; counts int32 [rows, vocabulary], generated.
        """
        usage = self._table[slots]
        return usage > 0, usage >> 1

    def add(self, slots: Tensor, token_ids: Tensor) -> None:
        """Count one generated token in each of `slots`; both int64 [rows]."""
        self._count(slots, token_ids)

    def forget(self, sequence_id: int) -> None:
        """The sequence ended. What the device still writes to its row comes before what a next owner writes."""
        slot = self._slots.pop(sequence_id, None)
        if slot is not None:
            self._free.append(slot)

    def _count(self, slots: Tensor, token_ids: Tensor) -> None:
        twos = torch.full_like(token_ids, 2, dtype=torch.int32)
        self._table.view(-1).index_add_(0, slots * self._table.shape[1] + token_ids, twos)

    def _grow(self) -> None:
        had, vocab_size = self._table.shape
        more = max(_FIRST_SLOTS, had)
        self._table = torch.cat([self._table, self._table.new_zeros(more, vocab_size)])
        self._free.extend(range(had + more - 1, had - 1, -1))
