"""What the scheduler asks of whoever keeps the adapters' weights."""

from __future__ import annotations

from typing import Protocol

AdapterKey = tuple[str, str]
"""(adapter_id, revision)."""


class Demand(Protocol):
    """What the tiers may ask about the sequences that wait."""

    def waits(self, key: AdapterKey) -> bool:
        """Whether a sequence waits with this adapter, loaded or not."""
        ...

    def turn(self, adapter_id: str | None) -> float:
        """The place of the adapter's next sequence, here or to come, in the fair order: the least is served first."""
        ...


class AdapterTiers(Protocol):
    """Where adapters are, as far as the scheduler must know.

    Each load that `rank` asked for ends with one call of `Scheduler.adapter_loaded` or `adapter_failed`.
    """

    def follow(self, demand: Demand) -> None:
        """Load first what is served first; evict what nobody waits for, then what is served last."""
        ...

    def rank(self, key: AdapterKey) -> int | None:
        """What the adapter adds to the sum of ranks; None: on its way to the host tier. Asking asks for the load."""
        ...

    def acquire(self, key: AdapterKey) -> bool:
        """Make the adapter resident in the gpu pool and pin it once; False: no room now, nothing has changed.

        Must succeed while no adapter is pinned.
        """
        ...

    def release(self, key: AdapterKey) -> None:
        """Undo one `acquire`."""
        ...
