"""The search: the fewest GPUs whose busiest worker has room left, and what that worker's tiers hold then."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from loramux_worker.errors import ConfigurationError
from loramux_worker.planning.batching import Batch, Requests, Worker
from loramux_worker.planning.costs import GB, StepCosts, TierSpeeds
from loramux_worker.planning.placement import Placement
from loramux_worker.planning.popularity import Floats
from loramux_worker.planning.shape import ModelShape
from loramux_worker.planning.tiers import TierBytes, found_in
from loramux_worker.planning.waiting import FirstToken, first_token

_STEP_ROOM = 3 * GB  # activations, logits, graphs, libraries: `engine/memory.py`
_KV_LEAST, _KV_HEADROOM = 0.2, 2.0  # of what weights leave; times what sequences take on average
_MOST_GPUS = 1000


@dataclass(frozen=True, kw_only=True, eq=False)
class Load:
    """What is asked. `shares` and `ranks` [adapters]; `rate` in requests a second, of all adapters together."""

    shape: ModelShape
    shares: Floats
    ranks: Floats
    rate: float
    requests: Requests


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """What there is, a GPU a worker. Bytes of one worker; `partitions` None: eight a GPU."""

    gpu_bytes: float = 80 * GB
    host_bytes: float = 64 * GB
    disk_bytes: float = 200 * GB
    partitions: int | None = None
    shards: int = 2
    utilisation: float = 0.7  # of the rate that the busiest worker could take
    speed: float = 1.0  # of the GPU, beside an H100
    speeds: TierSpeeds = field(default_factory=TierSpeeds)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The answer, all of the busiest worker but `gpus`, `partitions`, `imbalance` and `store_bytes`."""

    gpus: int
    partitions: int
    imbalance: float  # the busiest worker's requests, beside the mean
    rate: float  # requests a second
    most_rate: float  # that it could take
    adapters: int  # that it meets
    room: TierBytes
    kv_bytes: float
    store_bytes: float
    found: tuple[float, float, float, float]  # shares of requests, by tier
    loads: tuple[float, float]  # of what disk and store give, the shares that are used
    batch: Batch
    first_token: FirstToken


def plan(load: Load, fleet: Fleet, gpus: int | None = None) -> Plan:
    """The plan for `gpus`, or else for the fewest that do, found by halving.

    Raises ConfigurationError where no number does, saying what stands in the way.
    """
    if gpus is not None:
        found = _try(load, fleet, gpus)
        if isinstance(found, str):
            raise ConfigurationError(f"--gpus {gpus}: {found}")
        return found
    too_few, enough = 0, 1
    found = _try(load, fleet, enough)
    while isinstance(found, str):
        if enough == _MOST_GPUS:
            raise ConfigurationError(f"no number of GPUs up to {_MOST_GPUS} does: {found}")
        too_few, enough = enough, min(2 * enough, _MOST_GPUS)
        found = _try(load, fleet, enough)
    while enough - too_few > 1:  # as chance places adapters, a few GPUs less may do where a few more do not
        middle = (too_few + enough) // 2
        at = _try(load, fleet, middle)
        if isinstance(at, Plan):
            enough, found = middle, at
        else:
            too_few = middle
    return found


def _try(load: Load, fleet: Fleet, gpus: int) -> Plan | str:
    """The plan for so many GPUs, or why they do not do."""
    partitions = fleet.partitions or 8 * gpus
    if partitions < gpus:
        raise ConfigurationError(f"--partitions {partitions}: {gpus} GPUs need as many, each worker reads its own")
    placement = Placement.spread(load.shares, partitions, fleet.shards, gpus)
    by_worker = placement.loads()
    adapters, shares = placement.of_worker(int(by_worker.argmax()))
    sizes = load.ranks[adapters] * load.shape.adapter_bytes_per_rank
    worker = Worker(
        costs=StepCosts.of(load.shape, fleet.speed),
        requests=load.requests,
        kv_bytes_per_token=load.shape.kv_bytes_per_token,
        shares=shares / shares.sum(),
        sizes=sizes,
    )
    rate, most = load.rate * float(by_worker.max()), worker.most()
    batch = worker.batch(rate)
    if rate > fleet.utilisation * most or batch is None:
        busiest = load.rate * float(load.shares.max()) / min(fleet.shards, partitions)
        why = (
            f"the busiest of {gpus} workers would have {rate:.1f} requests/s, and takes {fleet.utilisation * most:.1f}"
        )
        if busiest > fleet.utilisation * most:
            why += f"; the busiest adapter alone brings {busiest:.1f}: spread it over more partitions (--shards)"
        return why
    free = fleet.gpu_bytes - load.shape.weight_bytes - _STEP_ROOM
    length = load.requests.prompt + load.requests.new
    kv_needed = _KV_HEADROOM * max(1.0, batch.sequences) * length * load.shape.kv_bytes_per_token
    kv_needed = max(kv_needed, _KV_LEAST * max(0.0, free))
    running = worker.distinct(batch.sequences + 1)[1]
    if free < kv_needed + max(running, float(sizes.max())):
        return (
            f"weights take {load.shape.weight_bytes / GB:.1f} GB of a GPU's {fleet.gpu_bytes / GB:.0f}, "
            f"the KV cache of {batch.sequences:.0f} sequences needs {kv_needed / GB:.1f}, "
            f"the adapters of a step {running / GB:.1f}"
        )
    total = float(sizes.sum())
    gpu = min(free - kv_needed, total)
    room = TierBytes(gpu=gpu, host=min(fleet.host_bytes, total), disk=min(fleet.disk_bytes, 1.2 * total))
    found = found_in(worker.shares, sizes, room)
    mean_size = float(worker.shares @ sizes)
    downloads = fleet.speeds.downloads / (fleet.speeds.store_latency + mean_size / fleet.speeds.download)
    loads = (rate * (found[2] + found[3]) * mean_size / fleet.speeds.read, rate * found[3] / downloads)
    if max(loads) > fleet.utilisation:
        tier = "--host-memory" if loads[0] > loads[1] else "--disk-quota"
        return f"adapters would come in at {max(loads):.1f} × what tiers give: say more {tier}"
    return Plan(
        gpus=gpus,
        partitions=partitions,
        imbalance=float(by_worker.max() * gpus),
        rate=rate,
        most_rate=most,
        adapters=len(adapters),
        room=room,
        kv_bytes=free - gpu,
        store_bytes=float(load.ranks.sum()) * load.shape.adapter_bytes_per_rank,
        found=found,
        loads=loads,
        batch=batch,
        first_token=first_token(batch, found, fleet.speeds.load_seconds(mean_size)),
    )


def spread_ranks(adapters: int, ranks: list[int]) -> Floats:
    """A rank for each adapter, in turn of those given, so that the popular have all of them."""
    return np.resize(np.array(ranks, dtype=float), adapters)
