"""Where a request finds its adapter: the pool, then the host, then the disk, then the store."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loramux_worker.planning.caching import hit_ratios
from loramux_worker.planning.popularity import Floats

TIERS = ("gpu", "host", "disk", "store")


@dataclass(frozen=True, kw_only=True)
class TierBytes:
    """Room of one worker's tiers in bytes."""

    gpu: float
    host: float
    disk: float


def found_in(rates: Floats, sizes: Floats, room: TierBytes) -> tuple[float, float, float, float]:
    """The share of requests whose adapter is first found in each of `TIERS`; the sum is 1.

    `rates`, `sizes` [n]: of a worker's adapters. Pool and disk tier see every request, the host tier those that the
    pool has not answered. What has been away for so long that it has left the disk is taken to have left the tiers
    above it too, or the other way around where those have more room.
    """
    asked = rates / rates.sum()
    in_pool = hit_ratios(asked, sizes, room.gpu)
    not_in_pool = 1 - in_pool
    not_above = not_in_pool * (1 - hit_ratios(asked * not_in_pool, sizes, room.host))
    nowhere = np.minimum(not_above, 1 - hit_ratios(asked, sizes, room.disk))
    shares = (in_pool, not_in_pool - not_above, not_above - nowhere, nowhere)
    gpu, host, disk, store = (float(asked @ share) for share in shares)
    return gpu, host, disk, store
