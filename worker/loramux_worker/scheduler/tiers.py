"""What the scheduler asks of whoever keeps the adapters' weights."""

from __future__ import annotations

from typing import Protocol

AdapterKey = tuple[str, str]
"""(adapter_id, revision)."""


class AdapterTiers(Protocol):
    """Where adapters are, as far as the scheduler must know.

    Each load that `rank` asked for ends with one call of `Scheduler.adapter_loaded` or `adapter_failed`.
    """

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
