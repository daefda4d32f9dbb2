"""Scheduling policies over load patterns, in simulated time: throughput, waiting of light tenants, fairness.

    python tests/benchmarks/sim_fairness.py [--only flood,zipf] [--seconds 20] [--shape 8b] [--plot fairness.png]

The scheduler is the product's own; the engine is simulated, by steps that were measured. Policies: first come first
served, round robin, a time slice as LoRAX has it, plain Virtual Token Counter (nothing is kept for who finds no room),
and ours, as it is set and with its knobs `locality` and `residency_quantum` at other values. Seeds are fixed.

Columns: prompt and generated tokens a second; time to the first token of the light tenants' requests; of adapters that
had loaded sequences waiting for two seconds on end, Jain's index of the service they got meanwhile (1: all alike) and
the largest difference between two; adapters read from files and copied to the device; ranks of a step. The last line
of the output is a JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fairness_engine import SimulatedTiers, StepCosts, TierCosts
from fairness_policies import FirstCome, Policy, RoundRobin, TimeSlice, ours
from fairness_run import Run
from fairness_traces import TRACES, Trace
from machine import describe_machine

from loramux_worker.engine.kv_cache import BlockPool
from loramux_worker.scheduler import SchedulerConfig

POLICIES: dict[str, Callable[..., Policy]] = {
    "first come": FirstCome,
    "round robin": RoundRobin,
    "time slice": TimeSlice,
    "plain VTC": partial(ours, locality=0.0, residency_quantum=math.inf),
    "ours": ours,
    **{f"locality {value}": partial(ours, locality=value) for value in (1000, 4000, 16_000)},
    **{f"quantum {value}": partial(ours, residency_quantum=value) for value in (2048, 32_768)},
}
KNOBS = {"flood": ("locality",), "zipf": ("locality",), "tight": ("locality", "quantum")}  # where they change a thing
RIVALS = ("first come", "round robin", "time slice", "plain VTC")
COLUMNS = {
    "tokens_per_s": "tokens/s",
    "light_ttft_p50_ms": "TTFT p50",
    "light_ttft_p99_ms": "p99 ms",
    "jain": "Jain",
    "gap": "gap",
    "loads": "loads",
    "copies": "copies",
    "ranks_per_step": "ranks",
}


def measure(policy: str, trace: Trace, costs: StepCosts, seconds: float) -> dict[str, Any]:
    """One row of the table."""
    ranks = trace.ranks()
    tier_costs = TierCosts(pool_ranks=int(TierCosts.pool_ranks * trace.pool_share))
    tiers = SimulatedTiers(tier_costs, costs.adapter_bytes, ranks, fair=policy not in RIVALS)
    tiers.fill_host([(adapter_id, "r") for adapter_id in ranks if adapter_id not in trace.cold])
    config = SchedulerConfig(max_model_len=2048)
    run = Run(trace, POLICIES[policy](config, BlockPool(40_000, 16), tiers), tiers, costs, seconds)
    return {"trace": trace.name, "policy": policy, **run.figures()}


def main() -> None:
    """Print the table, then the JSON document; draw it if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(TRACES), help="traces by commas: " + ", ".join(TRACES))
    parser.add_argument("--seconds", type=float, default=20.0, help="simulated seconds of each trace")
    parser.add_argument("--shape", choices=("8b", "1b"), default="8b", help="whose measured steps")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--plot", type=Path, help="a PNG to draw")
    arguments = parser.parse_args()
    costs = StepCosts.read(arguments.shape)
    rows: list[dict[str, Any]] = []
    for name in arguments.only.split(","):
        if name not in TRACES:
            raise SystemExit(f"--only {name}: say {', '.join(TRACES)}")
        trace = TRACES[name](random.Random(arguments.seed), arguments.seconds)
        print(f"\n{name}: {trace.about}, {len(trace.arrivals)} requests")
        print(f"{'':14}" + "".join(f"{title:>10}" for title in COLUMNS.values()))
        for policy in POLICIES if name != "quiet" else ("ours",):
            knob, _, value = policy.partition(" ")
            if value.isdigit() and knob not in KNOBS.get(name, ()):
                continue
            row = measure(policy, trace, costs, arguments.seconds)
            rows.append(row)
            print(f"{policy:14}" + "".join(f"{row[column]:>10}" for column in COLUMNS), flush=True)
    if arguments.plot:
        from plot_fairness import draw

        draw(rows, arguments.plot)
    settings = {"seconds": arguments.seconds, "seed": arguments.seed, "costs": costs.source, "tiers": vars(TierCosts())}
    print(json.dumps({"benchmark": "fairness", **settings, "machine": describe_machine(), "rows": rows}))


if __name__ == "__main__":
    main()
