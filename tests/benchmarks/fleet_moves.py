"""What it costs that partitions move: a fleet's tiers, warm, then a worker less or one more."""

from __future__ import annotations

import random
from collections import Counter
from copy import deepcopy
from itertools import accumulate
from typing import Any

from fleet_tiers import TIERS, WorkerTiers

from loramux_producer.partitions import shard_partitions

WINDOW = 5000  # requests of the fleet
BACK = 0.01  # the store's share is again within this of what it settles at


class Fleet:
    """Workers, who reads which partition, and where the client sends each adapter's requests."""

    def __init__(self, workers: int, partitions: int, k: int, adapters: int, room: dict[str, int], seed: int) -> None:
        self._draw = random.Random(seed)
        self._room = room
        self._adapters = range(adapters)
        self._weights = list(accumulate(1 / (place + 1) for place in self._adapters))
        self._shards = [shard_partitions(f"tenant-{adapter}", partitions, k) for adapter in self._adapters]
        self._tiers = [WorkerTiers(**room) for _ in range(workers)]
        self._owners = [partition % workers for partition in range(partitions)]

    def run(self, windows: int) -> list[dict[str, float]]:
        """Shares of requests by the tier that had the adapter, window by window."""
        return [self._window() for _ in range(windows)]

    def lose(self, worker: int) -> float:
        """Its partitions go to those that have the fewest, the rest stay; the share that moved."""
        moved = [partition for partition, owner in enumerate(self._owners) if owner == worker]
        others = [other for other in range(len(self._tiers)) if other != worker]
        for partition in moved:
            self._owners[partition] = min(others, key=self._owners.count)
        return len(moved) / len(self._owners)

    def add(self) -> float:
        """A new worker with empty tiers takes its part from those that have the most; the share that moved."""
        worker = len(self._tiers)
        self._tiers.append(WorkerTiers(**self._room))
        moved = len(self._owners) // len(self._tiers)
        for _ in range(moved):
            most = max(range(worker), key=self._owners.count)
            self._owners[self._owners.index(most)] = worker
        return moved / len(self._owners)

    def _window(self) -> dict[str, float]:
        found: Counter[str] = Counter()
        for adapter in self._draw.choices(self._adapters, cum_weights=self._weights, k=WINDOW):
            partition = self._draw.choice(self._shards[adapter])
            found[self._tiers[self._owners[partition]].find(adapter)] += 1
        return {tier: found[tier] / WINDOW for tier in TIERS}


def moves(settings: dict[str, Any], warm: int, after: int) -> dict[str, dict[str, Any]]:
    """By event: the store's share before, in each window after, and what it cost beyond where it settles."""
    rows = {}
    warmed = Fleet(**settings)
    before = [window["store"] for window in warmed.run(warm)[-4:]]
    for event in ("a worker lost", "a worker more"):
        fleet = deepcopy(warmed)
        moved = fleet.lose(0) if event == "a worker lost" else fleet.add()
        store = [window["store"] for window in fleet.run(after)]
        settled = sum(store[-4:]) / 4
        again = next((i for i in range(after) if store[i] <= settled + BACK), after)
        rows[event] = {
            "moved": round(moved, 3),
            "store_before": round(sum(before) / len(before), 4),
            "store_after": [round(share, 4) for share in store],
            "settled": round(settled, 4),
            "requests_until_settled": again * WINDOW,
            "further_downloads": round(sum(max(0.0, share - settled) for share in store[:again]) * WINDOW),
        }
    return rows
