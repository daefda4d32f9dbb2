"""A bounded label for each adapter, for metrics."""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable

BASE, OTHER = "base", "other"


class AdapterLabels:
    """Keeps the label `adapter` bounded: the first adapters have their own, the rest share `other`.

    An adapter that has overtaken the least busy one with a label of its own takes its place; `on_lost` is told of it.
    """

    def __init__(self, limit: int, on_lost: Callable[[str], None] = lambda label: None) -> None:
        self._limit = limit
        self._on_lost = on_lost
        self._named: Tally[str] = Tally()
        self._others: Tally[str] = Tally()

    def of(self, adapter_id: str | None) -> str:
        """The label for one more request of an adapter; the base model is `base`."""
        if adapter_id is None:
            return BASE
        if adapter_id in self._named or len(self._named) < self._limit:
            self._named[adapter_id] += 1
            return adapter_id
        self._others[adapter_id] += 1
        count = self._others[adapter_id]
        if count % self._limit == 0:  # looking for the least busy one costs a scan: not at every request
            least, fewest = min(self._named.items(), key=lambda item: item[1])
            if count > fewest:
                del self._named[least], self._others[adapter_id]
                self._named[adapter_id] = count
                self._on_lost(least)
                return adapter_id
        if len(self._others) > 10 * self._limit:
            self._others = Tally(dict(self._others.most_common(self._limit)))
        return OTHER

    def current(self, adapter_id: str | None) -> str:
        """The label that the adapter has now."""
        if adapter_id is None:
            return BASE
        return adapter_id if adapter_id in self._named else OTHER
