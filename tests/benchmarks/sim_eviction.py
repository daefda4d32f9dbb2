"""Which eviction policy keeps the right adapters: hit ratios by policy, trace and capacity.

    python tests/benchmarks/sim_eviction.py [--adapters 1000] [--requests 200000] [--seed 1]

Adapters have ranks 8 to 64, capacity is a share of their bytes. Traces: Zipf(1) and Zipf(0.8); Zipf(1) with a scan
(every tenth request names an adapter that is never named again); Zipf(1) whose favourites change eight times. The last
line of the output is a JSON object. `lfu` counts all past uses of what is resident, and is there for comparison.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import accumulate, count
from typing import Any, Protocol

from loramux_worker.adapters.eviction import S3Fifo

RANKS = (8, 16, 16, 32, 64)
CAPACITIES = (0.02, 0.05, 0.1, 0.2, 0.5)


class Policy(Protocol):
    """What `S3Fifo` and its rivals have in common."""

    def add(self, key: int, size: int) -> None: ...

    def touch(self, key: int) -> None: ...

    def evict(self, may_go: Callable[[int], bool]) -> int | None: ...


class Lru:
    """The least recently used first."""

    def __init__(self) -> None:
        self._keys: OrderedDict[int, None] = OrderedDict()

    def add(self, key: int, size: int) -> None:
        self._keys[key] = None

    def touch(self, key: int) -> None:
        self._keys.move_to_end(key)

    def evict(self, may_go: Callable[[int], bool]) -> int | None:
        return self._keys.popitem(last=False)[0]


class Lfu:
    """The least often used first, among equals the oldest."""

    def __init__(self) -> None:
        self._uses: dict[int, int] = {}
        self._ever: dict[int, int] = {}

    def add(self, key: int, size: int) -> None:
        self._uses[key] = self._ever[key] = self._ever.get(key, 0) + 1

    def touch(self, key: int) -> None:
        self._uses[key] = self._ever[key] = self._ever[key] + 1

    def evict(self, may_go: Callable[[int], bool]) -> int | None:
        key = min(self._uses, key=self._uses.__getitem__, default=None)
        if key is not None:
            del self._uses[key]
        return key


POLICIES: dict[str, Callable[[int], Policy]] = {
    "lru": lambda capacity: Lru(),
    "s3-fifo": S3Fifo,
    "lfu": lambda capacity: Lfu(),
}


def zipf(adapters: int, requests: int, exponent: float, draw: random.Random) -> list[int]:
    """Requests for adapters by their rank in popularity."""
    weights = list(accumulate((i + 1) ** -exponent for i in range(adapters)))
    return draw.choices(range(adapters), cum_weights=weights, k=requests)


def traces(adapters: int, requests: int, draw: random.Random) -> dict[str, list[int]]:
    """Adapter numbers, by the name of the trace; numbers from `adapters` on are of a scan."""
    once = count(adapters)
    return {
        "zipf 1": zipf(adapters, requests, 1.0, draw),
        "zipf 0.8": zipf(adapters, requests, 0.8, draw),
        "zipf 1 + scan": [next(once) if draw.random() < 0.1 else a for a in zipf(adapters, requests, 1.0, draw)],
        "zipf 1, changing": list(changing(adapters, requests, draw)),
    }


def changing(adapters: int, requests: int, draw: random.Random) -> Iterator[int]:
    """Zipf(1) over an order that is shuffled anew eight times."""
    order = list(range(adapters))
    for _ in range(8):
        draw.shuffle(order)
        yield from (order[a] for a in zipf(adapters, requests // 8, 1.0, draw))


def hit_ratio(policy: Policy, capacity: int, trace: list[int], size_of: Callable[[int], int]) -> float:
    """The share of requests whose adapter was there."""
    resident: set[int] = set()
    used = hits = 0
    for adapter in trace:
        if adapter in resident:
            policy.touch(adapter)
            hits += 1
            continue
        size = size_of(adapter)
        while used + size > capacity:
            victim = policy.evict(lambda key: True)
            assert victim is not None
            resident.remove(victim)
            used -= size_of(victim)
        policy.add(adapter, size)
        resident.add(adapter)
        used += size
    return hits / len(trace)


def main() -> None:
    """Print a table by trace and capacity, then the JSON document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    ranks = [draw.choice(RANKS) for _ in range(arguments.adapters)]

    def size_of(adapter: int) -> int:
        return ranks[adapter % arguments.adapters]

    rows: list[dict[str, Any]] = []
    print(f"{'trace':18}{'capacity':>9}" + "".join(f"{name:>10}" for name in POLICIES))
    for name, trace in traces(arguments.adapters, arguments.requests, draw).items():
        for share in CAPACITIES:
            capacity = int(sum(ranks) * share)
            ratios = {p: round(hit_ratio(make(capacity), capacity, trace, size_of), 4) for p, make in POLICIES.items()}
            rows.append({"trace": name, "capacity": share, **ratios})
            print(f"{name:18}{share:9.0%}" + "".join(f"{ratio:10.1%}" for ratio in ratios.values()), flush=True)
    print(json.dumps({"benchmark": "eviction", **vars(arguments), "rows": rows}))


if __name__ == "__main__":
    main()
