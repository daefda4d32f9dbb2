"""A fleet in numbers: hit ratios and balance by partitions and k, lost and further workers, and how true all this is.

    python tests/benchmarks/sim_fleet.py [--only measured,policy,spread,moves] [--plot fleet.png]

measured: what one real worker with 1,000 adapters counted (`results/tiers.json`) beside its trace in this simulation,
and what the engine took on a GPU (`results/engine-*.json`) beside `loramux plan`'s model of steps. policy: that model's
hit ratios and its placement beside the real S3-FIFO and the client's rendezvous hashing. spread: 1,000 workers and
1,000,000 adapters by partitions and k. moves: eight workers of which one is lost, or a ninth that comes. The last line
of the output is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from fleet_metrics import WorkerMetrics
from fleet_moves import moves
from fleet_tiers import TIERS, WorkerTiers
from machine import describe_machine

from loramux_producer.partitions import shard_partitions
from loramux_worker.planning.batching import Requests, Worker
from loramux_worker.planning.costs import StepCosts
from loramux_worker.planning.placement import Placement
from loramux_worker.planning.popularity import zipf
from loramux_worker.planning.shape import KNOWN
from loramux_worker.planning.tiers import TierBytes, found_in

RESULTS = Path(__file__).parent / "results"
ROOM = {"gpu": 500, "host": 750, "disk": 2400}  # adapters of rank 16 of an 8B: 42, 63 and 201 GB
SEED = 1


def measured() -> dict[str, Any]:
    """Rows by what was measured: the figure, ours, and the difference as a share of the measured one."""
    tiers = json.loads((RESULTS / "tiers.json").read_text())
    run, settings = tiers["zipf"], tiers["settings"]
    adapters, requests = settings["adapters"], settings["requests"]
    trace = random.Random(1).choices(range(adapters), [1 / (i + 1) for i in range(adapters)], k=requests)  # its own
    room = {tier: round(run["budgets"][tier] / run["adapter_bytes"]) for tier in ("gpu", "host", "disk")}
    counted = WorkerMetrics(**room, at_once=settings["at_once"]).run(trace)
    rows = {f"{tier}: hits": _row(run["tiers"][tier]["hit_ratio"], counted[tier]) for tier in counted}
    came = {tier: run["tiers"][tier] for tier in room}
    came_in = {tier: at["adapter_evictions_total"] + at["adapters_resident"] for tier, at in came.items()}
    worker = WorkerTiers(**room)
    found = Counter(worker.find(adapter) for adapter in trace)
    ours = (requests - found["gpu"], found["disk"] + found["store"], found["store"])
    for tier, number in zip(room, ours, strict=True):
        rows[f"{tier}: came in, a request"] = _row(came_in[tier] / requests, number / requests)
    return rows | _engine("8b", 70, 10) | _engine("1b", 70, 10) | _crowd()


def _engine(shape: str, prompt: int, new: int) -> dict[str, Any]:
    """One request alone, with an adapter: milliseconds."""
    figures = json.loads((RESULTS / f"engine-{shape}.json").read_text())
    ms = next(row["ms"] for row in figures["alone"] if row["mix"] == "distinct")
    batch = _worker(shape, prompt, new, 1000).batch(1e-6)
    assert batch is not None
    return {f"{shape}: {prompt} + {new} tokens alone, ms": _row(ms, batch.prefill_ms + (new - 1) * batch.step_ms)}


def _crowd() -> dict[str, Any]:
    """512 requests of 64 + 128 tokens, 256 at a time, adapters Zipf(1) of 1,000: tokens a second."""
    figures = json.loads((RESULTS / "engine-1b.json").read_text())
    return {
        "1b: 256 at a time, tokens/s": _row(
            figures["crowd"]["zipf"]["tokens_per_s"], _worker("1b", 64, 128).most() * 128
        )
    }


def _worker(shape: str, prompt: int, new: int, adapters: int = 1000) -> Worker:
    model = KNOWN[shape]
    return Worker(
        costs=StepCosts.of(model),
        requests=Requests(prompt=prompt, new=new),
        kv_bytes_per_token=model.kv_bytes_per_token,
        shares=zipf(adapters, 1.0),
        sizes=np.full(adapters, 16.0 * model.adapter_bytes_per_rank),
    )


def _row(figure: float, ours: float) -> dict[str, float]:
    return {"measured": round(figure, 4), "predicted": round(ours, 4), "off": round(ours / figure - 1, 4)}


def policy() -> dict[str, Any]:
    """The model beside the real policy and the real hashing, by case; shares of requests by tier, and balance."""
    rows: dict[str, Any] = {}
    for exponent, room in ((1.0, (50, 200, 500)), (0.8, (50, 200, 500)), (1.2, (20, 50, 200)), (1.0, (100, 100, 300))):
        worker = WorkerTiers(*room)
        weights = zipf(1000, exponent)
        found = [
            worker.find(adapter) for adapter in random.Random(SEED).choices(range(1000), weights.tolist(), k=60_000)
        ]
        real = Counter(found[20_000:])
        ours = found_in(weights, np.ones(1000), TierBytes(gpu=room[0], host=room[1], disk=room[2]))
        rows[f"Zipf({exponent}), room {room}"] = {
            "policy": [round(real[tier] / 40_000, 4) for tier in TIERS],
            "model": [round(share, 4) for share in ours],
        }
    shares = zipf(2000, 1.0)
    hashed = np.array([shard_partitions(f"tenant-{i}", 64, 4) for i in range(2000)])
    real_loads = Placement(shares, hashed, np.arange(64) % 8).loads()
    drawn = [Placement.spread(shares, 64, 4, 8, seed).loads().max() * 8 for seed in range(20)]
    rows["balance of 8 workers, k 4"] = {
        "rendezvous": round(float(real_loads.max() * 8), 3),
        "drawn": [round(float(min(drawn)), 3), round(float(np.mean(drawn)), 3), round(float(max(drawn)), 3)],
    }
    return rows


def spread(workers: int = 1000, adapters: int = 1_000_000, sampled: int = 12) -> list[dict[str, Any]]:
    """By exponent, partitions and k: balance; and of some workers, adapters met and where requests find theirs."""
    rows = []
    room = TierBytes(**ROOM)
    for exponent, partitions, k in (
        *((0.6, partitions, 2) for partitions in (1000, 1500, 4000, 16_000)),
        *((0.6, 4000, k) for k in (1, 4, 8, 16)),
        *((1.0, 4000, k) for k in (2, 16)),
    ):
        placement = Placement.spread(zipf(adapters, exponent), partitions, k, workers, SEED)
        loads = placement.loads()
        busiest = int(loads.argmax())
        found = np.zeros(len(TIERS))
        met, weight = [], 0.0
        for worker in np.random.default_rng(SEED).choice(workers, sampled, replace=False):
            mine, shares = placement.of_worker(int(worker))
            met.append(len(mine))
            found += loads[worker] * np.array(found_in(shares, np.ones(len(mine)), room))
            weight += loads[worker]
        rows.append(
            {
                "zipf": exponent,
                "partitions": partitions,
                "k": k,
                "busiest": round(float(loads[busiest] * workers), 2),
                "p99": round(float(np.quantile(loads, 0.99) * workers), 2),
                "adapters": round(float(np.mean(met))),
                **{tier: round(float(share), 4) for tier, share in zip(TIERS, found / weight, strict=True)},
            }
        )
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    return rows


def moved() -> dict[str, Any]:
    """Eight workers, 8,000 adapters; printed by window."""
    settings = {
        "workers": 8,
        "partitions": 64,
        "k": 2,
        "adapters": 8000,
        "room": {"gpu": 150, "host": 300, "disk": 1500},
    }
    return {"settings": settings} | moves({**settings, "seed": SEED}, warm=50, after=14)


PARTS: dict[str, Callable[[], Any]] = {"measured": measured, "policy": policy, "spread": spread, "moves": moved}


def main() -> None:
    """Print each part, then the JSON document; draw it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="parts by commas: " + ", ".join(PARTS))
    parser.add_argument("--plot", type=Path, help="a PNG to draw, of spread and moves")
    arguments = parser.parse_args()
    figures: dict[str, Any] = {}
    for part in arguments.only.split(","):
        if part not in PARTS:
            raise SystemExit(f"--only {part}: say {', '.join(PARTS)}")
        print(f"\n{part}")
        figures[part] = PARTS[part]()
        if isinstance(figures[part], dict):
            for name, row in figures[part].items():
                print(f"{name:34} {row}", flush=True)
    if arguments.plot:
        from plot_fleet import draw

        draw(figures, arguments.plot)
    print(json.dumps({"benchmark": "fleet", "machine": describe_machine(), "seed": SEED, **figures}))


if __name__ == "__main__":
    main()
