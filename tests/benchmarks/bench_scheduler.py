"""What a step costs the scheduler, at 10,000 waiting sequences over 5,000 adapters.

    python tests/benchmarks/bench_scheduler.py [--waiting 10000] [--adapters 5000] [--steps 2000]

The engine is a stand-in that appends a token where a step samples one. Finished sequences are replaced, so that as
many wait at the end as at the start. Times are CPU time of the thread, so that what else runs on the machine counts
little. The last line of the output is a JSON object.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

from loramux_worker.engine.kv_cache import BlockPool
from loramux_worker.engine.protocol import AdapterReference, SamplingParameters
from loramux_worker.engine.sequence import Sequence
from loramux_worker.scheduler import AdapterKey, AdapterPolicy, Demand, Policies, Scheduler, SchedulerConfig

Choice = Callable[[random.Random], int]


class PagedTiers:
    """A gpu pool of `slots` adapters of ranks 4 to 64; every adapter is in the host tier, or none ever arrives."""

    def __init__(self, slots: int, arrived: bool) -> None:
        self.slots = slots
        self.arrived = arrived
        self.pins: dict[AdapterKey, int] = {}

    def follow(self, demand: Demand) -> None:
        pass

    def rank(self, key: AdapterKey) -> int | None:
        return 4 << (int(key[0]) % 5) if self.arrived else None

    def acquire(self, key: AdapterKey) -> bool:
        if key not in self.pins and len(self.pins) >= self.slots:
            return False
        self.pins[key] = self.pins.get(key, 0) + 1
        return True

    def release(self, key: AdapterKey) -> None:
        self.pins[key] -= 1
        if not self.pins[key]:
            del self.pins[key]


@dataclass(frozen=True)
class Case:
    """A load: which adapter the next sequence has, and the bounds that it meets."""

    name: str
    choice: Choice
    slots: int = 256
    max_batch_ranks: int = 4096
    blocks: int = 20_000
    arrived: bool = True
    locality: float = 0.0
    limited: bool = False  # half of the adapters may run one request at a time and have few tokens a second

    def scheduler(self) -> Scheduler:
        config = SchedulerConfig(max_model_len=2048, max_batch_ranks=self.max_batch_ranks, locality=self.locality)
        limits = [AdapterPolicy("*[13579]", tokens_per_second=500.0, max_running=1)] if self.limited else []
        return Scheduler(config, BlockPool(self.blocks, 16), PagedTiers(self.slots, self.arrived), Policies(limits))


def uniform(num_adapters: int) -> Choice:
    return lambda random_: random_.randrange(num_adapters)


def cases(num_adapters: int) -> list[Case]:
    def flood(random_: random.Random) -> int:
        return 0 if random_.random() < 0.5 else random_.randrange(num_adapters)

    return [
        Case("uniform, room for 256 adapters", uniform(num_adapters)),
        Case("uniform, gpu pool of 64 adapters", uniform(num_adapters), slots=64),
        Case("uniform, 1,024 ranks", uniform(num_adapters), max_batch_ranks=1024),
        Case("uniform, KV cache short: preemptions", uniform(num_adapters), blocks=1200),
        Case("half of the load on one adapter", flood, slots=64),
        Case("locality of 4,000", uniform(num_adapters), locality=4000.0),
        Case("limits on every other adapter", uniform(num_adapters), limited=True),
        Case("every adapter still loading", uniform(num_adapters), arrived=False),
    ]


def measure(case: Case, waiting: int, steps: int) -> dict[str, float | int | str]:
    """Costs in milliseconds a call."""
    random_ = random.Random(0)
    scheduler = case.scheduler()
    schedule, advance, add, finish, tell = [], [], [], [], []

    def add_one(sequence_id: int) -> None:
        adapter_id = str(case.choice(random_))
        sequence = Sequence(
            sequence_id,
            [1] * random_.randint(16, 128),
            SamplingParameters(max_new_tokens=random_.randint(16, 128)),
            AdapterReference(adapter_id, "r1", ""),
            deadline=1e12 + random_.random(),
        )
        start = time.thread_time()
        scheduler.add(sequence)
        add.append(time.thread_time() - start)

    for next_id in range(waiting):
        add_one(next_id)
    next_id, running, adapters, preemptions = waiting, [], [], 0
    for number in range(steps):
        start = time.thread_time()
        step = scheduler.schedule(0.02 * number)
        middle = time.thread_time()
        samples = [chunk.sequence for chunk in step.chunks if chunk.samples]
        resume = time.thread_time()
        scheduler.advance(step)
        advance.append(time.thread_time() - resume)
        schedule.append(middle - start)
        running.append(len(step.chunks))
        adapters.append(scheduler.num_batch_adapters)
        preemptions += len(step.preempted)
        for sequence in samples:
            sequence.generated_token_ids.append(1)
            if len(sequence.generated_token_ids) == sequence.sampling.max_new_tokens:
                start = time.thread_time()
                scheduler.finish(sequence)
                finish.append(time.thread_time() - start)
        if number % 12 == 0:  # the engine does so four times a second
            start = time.thread_time()
            scheduler.adapter_stats()
            tell.append(time.thread_time() - start)
        while scheduler.num_waiting < waiting:
            add_one(next_id)
            next_id += 1
    scheduler.check_integrity()
    return {
        "case": case.name,
        "schedule_ms_mean": milliseconds(statistics.fmean(schedule)),
        "schedule_ms_p50": milliseconds(statistics.median(schedule)),
        "schedule_ms_p99": milliseconds(sorted(schedule)[int(0.99 * len(schedule))]),
        "schedule_ms_max": milliseconds(max(schedule)),
        "advance_ms_p50": milliseconds(statistics.median(advance)),
        "stats_ms_p50": milliseconds(statistics.median(tell)),
        "finish_us_p50": round(1e6 * statistics.median(finish), 2) if finish else None,
        "add_us_p50": round(1e6 * statistics.median(add), 2),
        "sequences_per_step": round(statistics.fmean(running), 1),
        "adapters_per_step": round(statistics.fmean(adapters), 1),
        "preemptions": preemptions,
    }


def milliseconds(seconds: float) -> float:
    return round(1e3 * seconds, 4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--waiting", type=int, default=10_000)
    parser.add_argument("--adapters", type=int, default=5_000)
    parser.add_argument("--steps", type=int, default=2_000)
    arguments = parser.parse_args()
    results = []
    for case in cases(arguments.adapters):
        gc.collect()
        result = measure(case, arguments.waiting, arguments.steps)
        results.append(result)
        print(
            f"{case.name:40} schedule {result['schedule_ms_p50']:.3f} ms p50, {result['schedule_ms_p99']:.3f} ms p99, "
            f"{result['schedule_ms_max']:.3f} ms max; {result['sequences_per_step']} sequences of "
            f"{result['adapters_per_step']} adapters a step, {result['preemptions']} preemptions",
            flush=True,
        )
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
    }
    figures = {"waiting": arguments.waiting, "adapters": arguments.adapters, "steps": arguments.steps}
    print(json.dumps({"benchmark": "scheduler", **figures, "machine": machine, "results": results}))


if __name__ == "__main__":
    main()
