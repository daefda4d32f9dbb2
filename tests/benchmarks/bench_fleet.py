"""Two to four real workers on one machine beside the simulation of the fleet, on the same trace.

    python tests/benchmarks/bench_fleet.py [--workers 3] [--adapters 600] [--requests 2000]

Each worker has a disk tier of its own; the pool holds 1/20 of the adapters, the host tier 1/10, the disk a quarter. One
client spreads each adapter over k of the partitions and draws adapters Zipf(1). Measured: how the requests divide, and
adapters that came into each tier, by request. Predicted: the same, from the partitions that each worker was assigned,
the client's own choice of partitions and the real eviction policy, request by request. The last line of the output is
a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import sys
import tempfile
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench_tiers import TOPICS, WEIGHTS, put_adapter, tier_figures
from bench_worker import make_model, say
from fleet_tiers import WorkerTiers
from machine import describe_machine

from loramux_producer import Client
from loramux_producer.partitions import PartitionChooser
from services.kafka import KafkaCluster
from services.s3 import S3Server
from services.worker import WorkerProcess

PARTS = {"gpu": 20, "host": 10, "disk": 4}  # of which a tier holds one
ENTRY_BYTES = 4096  # on disk beside the weights


def main() -> None:
    """Measure, predict and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=3, choices=(1, 2, 3, 4))
    parser.add_argument("--adapters", type=int, default=600)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--at-once", type=int, default=64, help="requests in flight (default 64)")
    parser.add_argument("--partitions", type=int, default=24)
    parser.add_argument("--shards", type=int, default=2, help="partitions of an adapter (default 2)")
    options = parser.parse_args()
    trace = random.Random(1).choices(
        range(options.adapters), [1 / (i + 1) for i in range(options.adapters)], k=options.requests
    )
    room = {tier: options.adapters // parts for tier, parts in PARTS.items()}
    measured, owners = measure(options, trace, room)
    predicted = predict(options, trace, room, owners)
    for name, figure in measured.items():
        print(f"{name:28} measured {figure:7.4f}  predicted {predicted[name]:7.4f}")
    figures = {"measured": measured, "predicted": predicted, "owners": owners}
    print(json.dumps({"benchmark": "fleet-real", "machine": describe_machine(), "settings": vars(options), **figures}))


def measure(
    options: argparse.Namespace, trace: list[int], room: dict[str, int]
) -> tuple[dict[str, float], dict[int, int]]:
    """Figures by name, and which worker reads each partition."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loramux-bench-")))
        say("making the model and an adapter")
        model, adapters = make_model(folder, 1)
        adapter = adapters / "tenant" / "0"
        size = (adapter / WEIGHTS).stat().st_size
        kafka, s3 = stack.enter_context(KafkaCluster()), stack.enter_context(S3Server())
        for topic in TOPICS:
            kafka.create_topic(topic, partitions=options.partitions)
        os.environ.update(s3.environment)
        bucket = s3.create_bucket("adapters")
        say(f"putting {options.adapters} adapters into S3")
        for number in range(options.adapters):
            put_adapter(s3, bucket, name_of(number), adapter, seed=number)
        flags = {
            "adapter_uri": f"s3://{bucket}/{{adapter_id}}",
            "adapter_memory": room["gpu"] * size,
            "host_memory": room["host"] * size,
            "disk_quota": room["disk"] * (size + ENTRY_BYTES),
            "max_model_len": 128,
        }
        workers = [
            stack.enter_context(WorkerProcess(kafka.bootstrap_servers, model, **flags)) for _ in range(options.workers)
        ]
        owners = wait_assigned(workers, options.partitions)
        say(f"{len(trace)} requests to {options.workers} workers")
        answered = asyncio.run(ask_all(kafka.bootstrap_servers, trace, options))
        assert answered == len(trace), f"{len(trace) - answered} requests were not answered"
        if wait_assigned(workers, options.partitions) != owners:
            raise SystemExit("partitions moved in the run: it says nothing, repeat it")
        pages = [worker.get("/metrics") for worker in workers]
    took = sorted((requests_of(page) / len(trace) for page in pages), reverse=True)
    figures = {f"requests, worker {place}": share for place, share in enumerate(took)}
    for tier in room:
        at = [tier_figures(page, tier) for page in pages]
        came = sum(found["adapter_evictions_total"] + found["adapters_resident"] for found in at)
        figures[f"{tier}: came in, a request"] = came / len(trace)
    return figures, owners


def wait_assigned(workers: list[WorkerProcess], partitions: int, seconds: int = 60) -> dict[int, int]:
    """The worker of each partition, once each has exactly one."""
    owners: dict[int, int] = {}
    for _ in range(seconds):
        read = [
            (int(partition), number)
            for number, worker in enumerate(workers)
            for partition in re.findall(r'^loramux_kafka_lag\{partition="(\d+)"\}', worker.get("/metrics"), re.M)
        ]
        owners = dict(read)
        if len(read) == len(owners) == partitions:
            return owners
        asyncio.run(asyncio.sleep(1))
    raise SystemExit(f"after {seconds} s the workers read {len(owners)} of {partitions} partitions")


def requests_of(page: str) -> float:
    """Requests that a worker has answered."""
    lines = [line for line in page.splitlines() if line.startswith("loramux_requests_total{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


async def ask_all(servers: str, trace: list[int], options: argparse.Namespace) -> int:
    """How many of the requests were answered."""
    gate = asyncio.Semaphore(options.at_once)
    async with Client(bootstrap_servers=servers, timeout=600, shards_per_adapter=options.shards) as client:

        async def ask(number: int) -> bool:
            async with gate:
                reply = await client.generate("hello, who?", adapter_id=name_of(number), max_new_tokens=4)
            return reply.adapter_id == name_of(number)

        return sum(await asyncio.gather(*(ask(number) for number in trace)))


def predict(
    options: argparse.Namespace, trace: list[int], room: dict[str, int], owners: dict[int, int]
) -> dict[str, float]:
    """The same figures from the simulation."""
    chooser = PartitionChooser(options.shards)
    tiers = [WorkerTiers(**room) for _ in range(options.workers)]
    took: Counter[int] = Counter()
    found: Counter[str] = Counter()
    for number in trace:
        partition = chooser.take(name_of(number), options.partitions)
        chooser.release(partition)
        worker = owners[partition]
        took[worker] += 1
        found[tiers[worker].find(number)] += 1
    shares = sorted((took[worker] / len(trace) for worker in range(options.workers)), reverse=True)
    figures = {f"requests, worker {place}": share for place, share in enumerate(shares)}
    came = {"gpu": len(trace) - found["gpu"], "host": found["disk"] + found["store"], "disk": found["store"]}
    return figures | {f"{tier}: came in, a request": number / len(trace) for tier, number in came.items()}


def name_of(number: int) -> str:
    """The id of an adapter."""
    return f"tenant-{number}"


if __name__ == "__main__":
    main()
