"""Hit ratios of S3-FIFO in its steady state, without a trace: a mean-field approximation.

As in Che's approximation of LRU (Che et al., 2002), queues are so long that what an adapter meets there depends on its
own requests alone: it spends `small` requests in the small queue, is remembered as a ghost for `ghost`, and each lap of
the main queue takes `main`. These three are found such that the queues hold what they hold (`adapters/eviction.py`).
Then an adapter goes around, from absent to absent, and its hit ratio is the share of that time in which it is there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loramux_worker.planning.popularity import Floats

_SMALL_SHARE = 0.1  # of S3Fifo
_CLASSES = 400  # of adapters by popularity, where there are more
_ROUNDS, _TOLERANCE, _DAMPING = 3000, 1e-4, 0.3
_MOST_LAPS = 100.0  # expected uses in a lap, beyond which an adapter does not leave in any case


def hit_ratios(rates: Floats, sizes: Floats, capacity: float) -> Floats:
    """Hit ratio by adapter [n], for requests at these relative rates [n] and adapters of these sizes [n].

    An adapter that nobody asks for has none. `capacity` is in the unit of `sizes`.
    """
    hits = np.zeros(len(rates))
    asked = np.flatnonzero(rates > 0)
    if not len(asked) or capacity <= 0:
        return hits
    if sizes[asked].sum() <= capacity:
        hits[asked] = 1.0
        return hits
    order = asked[np.argsort(rates[asked])]
    edges = np.unique(np.linspace(0, len(order), _CLASSES + 1).astype(int))
    if len(order) > _CLASSES:  # the most popular one by one: they differ most
        head = np.arange(len(order) - _CLASSES // 2, len(order) + 1)
        edges = np.unique(np.concatenate((edges[edges < head[0]], head)))
    lengths = np.diff(edges)
    classes = _Classes(
        np.add.reduceat(rates[order], edges[:-1]) / lengths / rates[asked].sum(),
        lengths.astype(float),
        np.add.reduceat(sizes[order], edges[:-1]),
    )
    hits[order] = np.repeat(classes.solve(capacity), lengths)
    return hits


@dataclass(frozen=True, eq=False)
class _Classes:
    """Adapters of about one rate: requests for one of them as a share of all, how many they are, their bytes."""

    rates: Floats
    counts: Floats
    sizes: Floats

    def solve(self, capacity: float) -> Floats:
        """The hit ratio of each class."""
        mean_size = self.sizes.sum() / self.counts.sum()
        small = main = ghost = capacity / mean_size
        target = np.array((_SMALL_SHARE, 1 - _SMALL_SHARE)) * capacity
        for _ in range(_ROUNDS):
            in_small, in_main, as_ghost = self._shares(small, main, ghost)
            held = np.array((self.sizes @ in_small, self.sizes @ in_main))
            ghosts, residents = float(self.counts @ as_ghost), float(self.counts @ (in_small + in_main))
            ratios = np.clip(np.array((*target / held, max(16.0, residents) / ghosts)), 0.1, 10.0)
            if np.abs(ratios[:2] - 1).max() < _TOLERANCE:
                break
            # beyond 1e12 nothing changes: adapters that all come back leave the ghosts short
            small, main, ghost = np.minimum(np.array((small, main, ghost)) * ratios**_DAMPING, 1e12)
        return np.minimum(1.0, in_small + in_main)

    def _shares(self, small: float, main: float, ghost: float) -> tuple[Floats, Floats, Floats]:
        """The share of time that an adapter of each class is in the small queue, in the main queue, a ghost."""
        again = -np.expm1(-self.rates * small)  # asked for again while in the small queue
        returns = -np.expm1(-self.rates * ghost)
        in_main = (again + (1 - again) * returns) * _laps(self.rates * main) * main
        as_ghost = (1 - again) * returns / self.rates
        cycle = 1 / self.rates + small + in_main + as_ghost
        return small / cycle, in_main / cycle, as_ghost / cycle


def _laps(uses: Floats) -> Floats:
    """Expected laps in the main queue, for a mean of `uses` a lap: a use more is a lap more, three are remembered."""
    uses = np.minimum(uses, _MOST_LAPS)
    none = np.exp(-uses)
    two = np.maximum(0.0, 1 - none * (1 + uses))  # or more
    three = np.maximum(0.0, two - none * uses**2 / 2)
    return (1 + two * (1 + two / none) / none + three / none) / none
