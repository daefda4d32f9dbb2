"""A simulated engine: what steps and copies cost, by what was measured, and where adapters are."""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from heapq import heappop, heappush
from pathlib import Path

from loramux_worker.adapters.eviction import S3Fifo
from loramux_worker.scheduler import AdapterKey, Demand, Step

RESULTS = Path(__file__).parent / "results"
RANK = 16  # of the adapters that were measured


@dataclass(frozen=True)
class StepCosts:
    """Seconds of a step: base by decoding sequences + LoRA by sequences + bytes of distinct ranks + prompt tokens.

    From `bench_engine.py`: decode steps without adapters, with one, and with every sequence its own; prefill of 4,096
    tokens in two steps. What lies between two measured batches is on the line between them.
    """

    source: str
    batches: tuple[int, ...]
    base: tuple[float, ...]
    lora: tuple[float, ...]  # one adapter for all, beyond base
    per_rank: float
    per_prompt_token: float
    adapter_bytes: int  # of RANK

    @classmethod
    def read(cls, shape: str) -> StepCosts:
        """From `results/engine-<shape>.json`."""
        path = RESULTS / f"engine-{shape}.json"
        figures = json.loads(path.read_text())
        ms = {(row["mix"], row["batch"]): row["step_ms"] for row in figures["steps"]}
        batches = tuple(sorted({batch for _, batch in ms}))
        base, one, distinct = ([ms[mix, batch] / 1e3 for batch in batches] for mix in ("base", "one", "distinct"))
        prefill = next(row["ms"] for row in figures["prefill"] if row["mix"] == "one") / 1e3
        return cls(
            path.name,
            batches,
            tuple(base),
            tuple(o - b for o, b in zip(one, base, strict=True)),
            (distinct[-1] - one[-1]) / (batches[-1] - 1) / RANK,
            (prefill / 2 - one[0]) / 2048,
            figures["adapter_bytes"],
        )

    def seconds(self, step: Step, ranks: dict[AdapterKey, int]) -> float:
        """How long the device runs it; `ranks` by distinct adapter of the step."""
        decoding = sum(1 for chunk in step.chunks if chunk.num_tokens == 1)
        prompt_tokens = sum(chunk.num_tokens for chunk in step.chunks) - decoding
        seconds = self._between(self.base, decoding) + self.per_prompt_token * prompt_tokens
        if ranks:
            seconds += self._between(self.lora, decoding)
            seconds += self.per_rank * max(0, sum(ranks.values()) - max(ranks.values()))
        return seconds

    def _between(self, values: tuple[float, ...], batch: int) -> float:
        batch = min(max(batch, self.batches[0]), self.batches[-1])
        right = bisect_left(self.batches, batch)
        if self.batches[right] == batch:
            return values[right]
        left = right - 1
        share = (batch - self.batches[left]) / (self.batches[right] - self.batches[left])
        return values[left] + share * (values[right] - values[left])


@dataclass(frozen=True, kw_only=True)
class TierCosts:
    """Room and speed of the tiers below the batch; speeds are what README's "Measured" says of these machines."""

    pool_ranks: int = 256 * RANK
    host_ranks: int = 1000 * RANK
    copy_bytes_per_second: float = 50e9  # pinned host memory to the device
    read_bytes_per_second: float = 1.2e9  # files to the host tier, all threads together
    loads_at_once: int = 4


class SimulatedTiers:
    """`AdapterTiers` in simulated time: a gpu pool over a host tier over files, each by S3-FIFO as in the product."""

    def __init__(self, costs: TierCosts, adapter_bytes: int, ranks: dict[str, int], *, fair: bool) -> None:
        self._costs = costs
        self._bytes_per_rank = adapter_bytes / RANK
        self._ranks = ranks
        self._fair = fair
        self._demand: Demand | None = None
        self._pool: dict[AdapterKey, int] = {}
        self._pool_used = self._host_used = 0
        self._pool_policy: S3Fifo[AdapterKey] = S3Fifo(costs.pool_ranks)
        self._host: dict[AdapterKey, int] = {}
        self._host_policy: S3Fifo[AdapterKey] = S3Fifo(costs.host_ranks)
        self._pins: Counter[AdapterKey] = Counter()
        self._wanted: set[AdapterKey] = set()
        self._asked: dict[AdapterKey, float] = {}  # turns of those that no thread reads yet
        self._reading: list[tuple[float, AdapterKey]] = []
        self.now = 0.0
        self.copied_ranks = 0  # since `take_copy_seconds`
        self.copies = self.loads = 0

    def fill_host(self, keys: list[AdapterKey]) -> None:
        """Begin with these in the host tier."""
        for key in keys:
            self._put_on_host(key)

    def follow(self, demand: Demand) -> None:
        self._demand = demand if self._fair else None

    def rank(self, key: AdapterKey) -> int | None:
        if key not in self._pool:
            self._wanted.add(key)
        if self.is_here(key):
            return self._ranks[key[0]]
        if key not in self._asked and all(key != reading for _, reading in self._reading):
            self._asked[key] = 0.0 if self._demand is None else self._demand.turn(key[0])
        return None

    def acquire(self, key: AdapterKey) -> bool:
        if key in self._pool:
            self._pool_policy.touch(key)
        elif not self._copy(key):
            return False
        self._pins[key] += 1
        self._wanted.discard(key)
        return True

    def release(self, key: AdapterKey) -> None:
        self._pins[key] -= 1
        if not self._pins[key]:
            del self._pins[key]

    def poll(self) -> list[AdapterKey]:
        """Loads that have ended by `now`; starts others in their place."""
        ended = []
        while self._reading and self._reading[0][0] <= self.now:
            key = heappop(self._reading)[1]
            self._put_on_host(key)
            ended.append(key)
        while self._asked and len(self._reading) < self._costs.loads_at_once:
            key = min(self._asked, key=self._asked.__getitem__)
            del self._asked[key]
            num_bytes = self._ranks[key[0]] * self._bytes_per_rank
            share = self._costs.read_bytes_per_second / self._costs.loads_at_once
            heappush(self._reading, (self.now + num_bytes / share, key))
            self.loads += 1
        return ended

    def is_here(self, key: AdapterKey) -> bool:
        """Whether it could run: it is in the pool or on the host."""
        return key in self._pool or key in self._host

    @property
    def next_load(self) -> float:
        """When the next load ends."""
        return self._reading[0][0] if self._reading else float("inf")

    def take_copy_seconds(self) -> float:
        """What the copies since the last call take; the step that was made with them waits for them."""
        ranks, self.copied_ranks = self.copied_ranks, 0
        return ranks * self._bytes_per_rank / self._costs.copy_bytes_per_second

    def _copy(self, key: AdapterKey) -> bool:
        rank = self._ranks[key[0]]
        if key not in self._host or sum(self._pool[pinned] for pinned in self._pins) + rank > self._costs.pool_ranks:
            return False
        while self._pool_used + rank > self._costs.pool_ranks:
            self._pool_used -= self._pool.pop(self._victim())
        self._pool[key] = rank
        self._pool_used += rank
        self._pool_policy.add(key, rank)
        self.copies += 1
        self.copied_ranks += rank
        return True

    def _victim(self) -> AdapterKey:
        unpinned = [key for key in self._pool if key not in self._pins]
        demand = self._demand
        unneeded = set(unpinned) if demand is None else {key for key in unpinned if not demand.waits(key)}
        if unneeded:
            victim = self._pool_policy.evict(unneeded.__contains__)
            assert victim is not None
            return victim
        assert demand is not None
        victim = max(unpinned, key=lambda key: demand.turn(key[0]))
        self._pool_policy.remove(victim)
        return victim

    def _put_on_host(self, key: AdapterKey) -> None:
        rank = self._ranks[key[0]]
        while self._host_used + rank > self._costs.host_ranks:
            victim = self._host_policy.evict(lambda other: other not in self._wanted)
            if victim is None:
                break  # a little more than there is, rather than a model of loads that wait for room
            self._host_used -= self._host.pop(victim)
        self._host[key] = rank
        self._host_used += rank
        self._host_policy.add(key, rank)
