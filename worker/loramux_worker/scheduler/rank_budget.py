"""The sum of the ranks of the adapters that run: what LoRA costs in a step."""

from __future__ import annotations

from collections.abc import KeysView

from loramux_worker.scheduler.tiers import AdapterKey


class RankBudget:
    """Counts the sequences of each adapter in the batch; an adapter costs its rank once, however many use it."""

    def __init__(self, max_ranks: int) -> None:
        self.max_ranks = max_ranks
        self.used = 0
        self._ranks: dict[AdapterKey, int] = {}
        self._sequences: dict[AdapterKey, int] = {}

    @property
    def adapters(self) -> KeysView[AdapterKey]:
        """The adapters in the batch."""
        return self._ranks.keys()

    def rank(self, key: AdapterKey) -> int | None:
        """Rank of an adapter that is in the batch, else None."""
        return self._ranks.get(key)

    def num_sequences(self, key: AdapterKey) -> int:
        """Sequences in the batch with this adapter."""
        return self._sequences.get(key, 0)

    def fits(self, key: AdapterKey, rank: int) -> bool:
        """Whether a sequence with this adapter may join. One whose rank alone is beyond the bound runs alone."""
        return key in self._ranks or not self._ranks or self.used + rank <= self.max_ranks

    def add(self, key: AdapterKey, rank: int) -> None:
        """A sequence with this adapter joins."""
        if key not in self._ranks:
            self._ranks[key] = rank
            self._sequences[key] = 0
            self.used += rank
        self._sequences[key] += 1

    def remove(self, key: AdapterKey) -> None:
        """A sequence with this adapter leaves."""
        self._sequences[key] -= 1
        if not self._sequences[key]:
            self.used -= self._ranks.pop(key)
            del self._sequences[key]
