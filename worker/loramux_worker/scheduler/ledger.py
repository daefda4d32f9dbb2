"""What each adapter got and waited for, under a bounded number of labels."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from loramux_worker.adapter_labels import OTHER, AdapterLabels
from loramux_worker.engine.protocol import AdapterStats
from loramux_worker.engine.sequence import Sequence
from loramux_worker.scheduler.client import Client
from loramux_worker.scheduler.fair_queue import FairQueue

_MAX_LABELS = 100


@dataclass(slots=True)
class _Account:
    service: float = 0.0
    queue_seconds: float = 0.0
    started: int = 0

    def add(self, other: _Account) -> None:
        self.service += other.service
        self.queue_seconds += other.queue_seconds
        self.started += other.started


class ServiceLedger:
    """Sums by label. Costs O(1) a sequence, nothing a token: service is read off the clients' counters."""

    def __init__(self, queue: FairQueue, max_labels: int = _MAX_LABELS) -> None:
        self._queue = queue
        self._labels = AdapterLabels(max_labels)
        self._accounts: defaultdict[str, _Account] = defaultdict(_Account)
        self._adapter_ids: dict[str, str | None] = {}  # by label

    def arrived(self, adapter_id: str | None) -> None:
        """A sequence came."""
        label = self._labels.of(adapter_id)
        if label != OTHER:
            self._adapter_ids[label] = adapter_id

    def started(self, client: Client, sequence: Sequence, now: float) -> None:
        """A sequence is in a step for the first time."""
        account = self._accounts[self._labels.current(client.adapter_id)]
        account.started += 1
        ready_at = sequence.adapter_ready_at
        account.queue_seconds += max(0.0, now - (sequence.submitted_at if ready_at is None else ready_at))

    def collect(self, client: Client) -> None:
        """Add what the client was served since the last time; to be called before it may be forgotten."""
        self._accounts[self._labels.current(client.adapter_id)].service += client.take_service()

    def stats(self, running: Iterable[Client]) -> list[AdapterStats]:
        """All labels, `other` last; `running` are the clients of the sequences that run, once for each."""
        in_batch: defaultdict[str, int] = defaultdict(int)
        for client in running:
            self.collect(client)
            in_batch[self._labels.current(client.adapter_id)] += 1
        self._forget_replaced()
        clients = {label: self._queue.client(adapter_id) for label, adapter_id in self._adapter_ids.items()}
        most = max((c.counter for c in clients.values() if c is not None and c.ready_lane is not None), default=0.0)
        rows = [self._row(label, client, in_batch[label], most) for label, client in clients.items()]
        num_waiting = len(self._queue) - sum(row.waiting for row in rows)
        account = self._accounts[OTHER]
        rows.append(
            AdapterStats(
                OTHER, account.service, account.queue_seconds, account.started, in_batch[OTHER], num_waiting, 0.0
            )
        )
        return rows

    def _row(self, label: str, client: Client | None, running: int, most: float) -> AdapterStats:
        account = self._accounts[label]
        deficit = 0.0 if client is None or client.ready_lane is None else (most - client.counter) * client.weight
        waiting = 0 if client is None else client.num_waiting
        return AdapterStats(label, account.service, account.queue_seconds, account.started, running, waiting, deficit)

    def _forget_replaced(self) -> None:
        """What was counted for an adapter that lost its label is `other`'s now."""
        for label, adapter_id in list(self._adapter_ids.items()):
            if self._labels.current(adapter_id) != label:
                del self._adapter_ids[label]
                self._accounts[OTHER].add(self._accounts.pop(label, _Account()))
