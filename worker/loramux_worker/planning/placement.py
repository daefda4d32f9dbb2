"""Where requests go: each adapter owns k of the partitions, and workers divide the partitions evenly.

The client chooses the k by rendezvous hashing (`loramux_producer.partitions`), which is k partitions at random, the
same each time. Here they are drawn for all adapters at once; `tests/benchmarks/sim_fleet.py` holds both beside one
another.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loramux_worker.planning.popularity import Floats

Integers = NDArray[np.integer[Any]]


def draw_shards(adapters: int, partitions: int, k: int, seed: int = 1) -> Integers:
    """Distinct partitions [adapters, min(k, partitions)] of each adapter, at random."""
    k = min(k, partitions)
    draw = np.random.default_rng(seed)
    if k * k >= partitions:  # rejection would take long
        order = np.argsort(draw.random((adapters, partitions)), axis=1)
        return order[:, :k]
    shards = draw.integers(partitions, size=(adapters, k))
    while True:
        ordered = np.sort(shards, axis=1)
        again = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
        if not again.any():
            return shards
        shards[again] = draw.integers(partitions, size=(int(again.sum()), k))


@dataclass(frozen=True, eq=False)
class Placement:
    """Requests by worker. `shards` [adapters, k]: partitions; `owners` [partitions]: the worker that reads each.

    The requests of an adapter spread evenly over its k partitions.
    """

    shares: Floats  # [adapters], their sum 1
    shards: Integers
    owners: Integers

    @classmethod
    def spread(cls, shares: Floats, partitions: int, k: int, workers: int, seed: int = 1) -> Placement:
        """Adapters at random over partitions, partitions in turn over workers."""
        return cls(shares, draw_shards(len(shares), partitions, k, seed), np.arange(partitions) % workers)

    @property
    def workers(self) -> int:
        """Workers, those without a partition at the end not counted."""
        return int(self.owners.max()) + 1

    def loads(self) -> Floats:
        """The share of all requests by worker [workers]."""
        k = self.shards.shape[1]
        workers = self.owners[self.shards].ravel()
        loads: Floats = np.bincount(workers, np.repeat(self.shares / k, k), self.workers).astype(float)
        return loads

    def of_worker(self, worker: int) -> tuple[Integers, Floats]:
        """The adapters that a worker meets, and each one's share of all requests there."""
        mine = (self.owners[self.shards] == worker).sum(axis=1)
        adapters = np.flatnonzero(mine)
        return adapters, self.shares[adapters] * mine[adapters] / self.shards.shape[1]
