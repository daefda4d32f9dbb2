"""Which partition a request goes to: shuffle sharding, then the partition with the least of ours in flight.

A request whose id the caller has chosen may come again, and workers know that only within a partition: it always
goes to the same one.

Each adapter owns `k` of the partitions. A tenant that floods its adapter fills those k queues and leaves the
others alone, and two adapters rarely own the same k.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache, partial
from hashlib import blake2b


@lru_cache(maxsize=65_536)
def shard_partitions(adapter_id: str, num_partitions: int, k: int) -> tuple[int, ...]:
    """The `min(k, num_partitions)` partitions that an adapter owns, the best first.

    Rendezvous hashing (Thaler and Ravishankar, 1998): every partition draws a number from (adapter,
    partition) and the k highest win. A topic that grows by one partition changes at most one shard of an
    adapter, and only to the new partition. Raises `ValueError` when there is no partition or k is not
    positive.
    """
    if num_partitions < 1 or k < 1:
        raise ValueError(f"{k} shards of {num_partitions} partitions: both must be positive")
    name = adapter_id.encode()
    ranked = sorted(range(num_partitions), key=lambda partition: _draw(name, partition), reverse=True)
    return tuple(ranked[:k])


def _draw(name: bytes, partition: int) -> bytes:
    return blake2b(name, digest_size=8, salt=partition.to_bytes(4, "big")).digest()


class PartitionChooser:
    """Chooses partitions and counts this client's requests in flight on each.

    `shards` partitions belong to each adapter; requests for the base model spread over all of them.
    """

    def __init__(self, shards: int) -> None:
        if shards < 1:
            raise ValueError(f"shards_per_adapter: {shards} is not positive")
        self._shards = shards
        self._in_flight: Counter[int] = Counter()
        self._turn = 0
        # Partition → the turn at which it was last taken.
        self._last_turns: dict[int, int] = {}

    def take(self, adapter_id: str | None, num_partitions: int, request_id: str | None = None) -> int:
        """The partition of one more request, of equally loaded ones the longest unused. Give it back with `release`.

        With a `request_id` it is that id's own among the adapter's: asked again, a request meets its first.
        """
        if adapter_id is None:
            candidates: tuple[int, ...] | range = range(num_partitions)
        else:
            candidates = shard_partitions(adapter_id, num_partitions, self._shards)
        if request_id is None:
            partition = min(candidates, key=lambda number: (self._in_flight[number], self._last_turns.get(number, 0)))
        else:
            partition = max(candidates, key=partial(_draw, request_id.encode()))
        self._in_flight[partition] += 1
        self._turn += 1
        self._last_turns[partition] = self._turn
        return partition

    def release(self, partition: int) -> None:
        """The request that took `partition` is no longer in flight."""
        self._in_flight[partition] -= 1
        if not self._in_flight[partition]:
            del self._in_flight[partition]

    def in_flight(self, partition: int) -> int:
        """How many requests have taken `partition` and not released it."""
        return self._in_flight[partition]
