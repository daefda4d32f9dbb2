"""What one worker's `/metrics` would say of its tiers after a trace, with many requests in flight.

`WorkerTiers` says where each request's adapter is when requests come one by one. In a worker they come together: a look
on disk while the files are downloaded is a miss; the host tier is asked whenever the pool has nothing, and a look while
the adapter is being read counts as neither. The pool is asked when a request runs. Those that wait are admitted in the
order of service, all of an adapter's at once; what runs is not evicted, and what is waited for last.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable

from fleet_tiers import Tier

STEPS = 5  # of one request; a download takes as long as a step


class WorkerMetrics:
    """Runs a trace with at most `at_once` requests in flight, in steps."""

    def __init__(self, gpu: int, host: int, disk: int, at_once: int) -> None:
        self._gpu, self._host, self._disk = Tier(gpu), Tier(host), Tier(disk)
        self._at_once = at_once
        self._looks: Counter[tuple[str, bool]] = Counter()
        self._downloading: list[int] = []
        self._reading: set[int] = set()
        self._waiting: Counter[int] = Counter()
        self._running: deque[tuple[int, int]] = deque()  # (the step in which it ends, adapter)
        self._pins: Counter[int] = Counter()
        self._served: Counter[int] = Counter()

    def run(self, trace: Iterable[int]) -> dict[str, float]:
        """Hit ratios by tier."""
        to_come, step = deque(trace), 0
        while to_come or self._running or self._waiting or self._downloading:
            while self._running and self._running[0][0] <= step:
                self._pins[self._running.popleft()[1]] -= 1
            arrived, self._downloading = self._downloading, []
            self._reading.clear()
            for adapter in arrived:
                self._prefetch(adapter)
            in_flight = len(self._running) + self._waiting.total() + len(self._downloading)
            for _ in range(min(self._at_once - in_flight, len(to_come))):
                self._come(to_come.popleft())
            self._admit(step + STEPS)
            step += 1
        return {
            tier: self._looks[tier, True] / (self._looks[tier, True] + self._looks[tier, False])
            for tier in ("gpu", "host", "disk")
        }

    def _come(self, adapter: int) -> None:
        here = self._disk.use(adapter) and adapter not in self._downloading
        self._looks["disk", here] += 1
        if here:
            self._prefetch(adapter)
        else:
            self._downloading.append(adapter)

    def _prefetch(self, adapter: int) -> None:
        if adapter not in self._gpu:
            here = self._host.use(adapter, lambda other: not self._waiting[other])
            if not here:
                self._reading.add(adapter)
            if not here or adapter not in self._reading:
                self._looks["host", here] += 1
        if not self._waiting[adapter] and not self._pins[adapter]:  # it was idle: lifted to the least of the others
            least = min((self._served[other] for other in self._waiting if self._waiting[other]), default=0)
            self._served[adapter] = max(self._served[adapter], least)
        self._waiting[adapter] += 1

    def _admit(self, end: int) -> None:
        for adapter in sorted(+self._waiting, key=self._served.__getitem__):
            if adapter not in self._gpu and self._gpu.is_full and not self._make_room():
                continue
            requests = self._waiting.pop(adapter)
            for _ in range(requests):
                self._looks["gpu", self._gpu.use(adapter)] += 1
            self._pins[adapter] += requests
            self._served[adapter] += requests
            self._running.extend([(end, adapter)] * requests)

    def _make_room(self) -> bool:
        unpinned = [adapter for adapter in self._gpu.here if not self._pins[adapter]]
        unneeded = [adapter for adapter in unpinned if not self._waiting[adapter]]
        if unneeded:
            self._gpu.evict(set(unneeded).__contains__)
        elif unpinned:
            self._gpu.drop(max(unpinned, key=self._served.__getitem__))
        return bool(unpinned)
