"""Adapters that do not fit: 1,000 in a real S3, traffic through real Kafka, and one whose download takes 20 seconds.

    python tests/benchmarks/bench_tiers.py [--only zipf,throttled]

zipf: the disk tier holds 500 adapters, the host tier 200, the pool 50; requests draw theirs Zipf(1). Reported are
answers, hit ratios of the tiers, peak memory and downloads at once. throttled: eight streams that never end, without
and beside a request for an adapter that a web server sends over 20 seconds; reported are the gaps between tokens. The
last line of standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench_worker import make_model, say
from safetensors.torch import load_file, save

from benchmarks.machine import describe_machine
from loramux_producer import Client
from services.kafka import KafkaCluster
from services.s3 import S3Server
from services.worker import WorkerProcess
from web_server import WebServer

TOPICS = ("lora.requests", "lora.replies", "lora.stream", "lora.dead-letters", "lora.control")
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
BUDGETS = {"gpu": "adapter_memory", "host": "host_memory", "disk": "disk_quota"}
SLOW_SECONDS, STREAMS = 20.0, 8


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="zipf,throttled", help="parts by commas (default both)")
    parser.add_argument("--adapters", type=int, default=1000)
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--at-once", type=int, default=200, help="requests in flight (default 200)")
    options = parser.parse_args()
    parts = {"zipf": zipf, "throttled": throttled}
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(prefix="loramux-bench-") as folder:
        say("making the model and an adapter")
        model, adapters = make_model(Path(folder), 1)
        with KafkaCluster() as kafka:
            for topic in TOPICS:
                kafka.create_topic(topic, partitions=4)
            for part in options.only.split(","):
                figures[part] = parts[part](kafka, model, adapters / "tenant" / "0", options)
                print(part, json.dumps(figures[part], indent=1), flush=True)
    print(json.dumps({"benchmark": "tiers", "machine": describe_machine(), "settings": vars(options), **figures}))


def zipf(kafka: KafkaCluster, model: Path, adapter: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Many adapters, few of which have room."""
    size = (adapter / WEIGHTS).stat().st_size
    with S3Server() as s3:
        os.environ.update(s3.environment)
        bucket = s3.create_bucket("adapters")
        say(f"putting {options.adapters} adapters into S3")
        for i in range(options.adapters):
            put_adapter(s3, bucket, f"tenant-{i}", adapter, seed=i)
        flags = {
            "adapter_uri": f"s3://{bucket}/{{adapter_id}}",
            "disk_quota": 500 * (size + 4096),
            "host_memory": 200 * size,
            "adapter_memory": 50 * size,
            "max_model_len": 128,
        }
        with WorkerProcess(kafka.bootstrap_servers, model, **flags) as worker, watched(worker) as peak:
            weights = [1 / (i + 1) for i in range(options.adapters)]
            names = random.Random(1).choices(range(options.adapters), weights, k=options.requests)
            say(f"{options.requests} requests")
            begun = time.perf_counter()
            answered = asyncio.run(ask_all(kafka.bootstrap_servers, names, options.at_once))
            wall = time.perf_counter() - begun
            time.sleep(1)
            page = worker.get("/metrics")
            tiers = {tier: tier_figures(page, tier) for tier in ("gpu", "host", "disk")}
            loading = sum(
                float(line.rpartition(" ")[2])
                for line in page.splitlines()
                if line.startswith("loramux_adapter_load_seconds_sum") and 'from="store"' in line
            )
    return {
        "distinct_adapters": len(set(names)),
        "adapter_bytes": size,
        "requests": len(names),
        "answered": answered,
        "lost": len(names) - answered,
        "requests_per_second": round(len(names) / wall, 1),
        "downloads_at_once_mean": round(loading / wall, 2),
        "budgets": {tier: flags[name] for tier, name in BUDGETS.items()},
        "tiers": tiers,
        "peak_bytes": peak,
    }


def put_adapter(s3: S3Server, bucket: str, name: str, adapter: Path, seed: int) -> None:
    """The adapter with other weights: each is a revision of its own."""
    tensors = load_file(adapter / WEIGHTS)
    first = next(iter(tensors))
    tensors[first] = torch.randn(tensors[first].shape, generator=torch.Generator().manual_seed(seed)) * 0.02
    store = s3.store(bucket)
    store.put(f"{name}/{CONFIG}", (adapter / CONFIG).read_bytes())
    store.put(f"{name}/{WEIGHTS}", save(tensors))


async def ask_all(servers: str, adapters: list[int], at_once: int) -> int:
    """How many of the requests were answered with what they asked for."""
    gate = asyncio.Semaphore(at_once)
    async with Client(bootstrap_servers=servers, timeout=600) as client:

        async def ask(number: int) -> bool:
            name = f"tenant-{number}"
            async with gate:
                reply = await client.generate("hello, who?", adapter_id=name, max_new_tokens=4, ignore_eos=True)
            return reply.adapter_id == name and reply.usage is not None and reply.usage.completion_tokens == 4

        return sum(await asyncio.gather(*(ask(number) for number in adapters)))


def tier_figures(page: str, tier: str) -> dict[str, float]:
    """What /metrics says of a tier."""
    found = {}
    for line in page.splitlines():
        if f'tier="{tier}"' in line and line.startswith(("loramux_adapter_", "loramux_adapters_")):
            name, _, value = line.rpartition(" ")
            found[name.removeprefix("loramux_")] = float(value)
    hits = sum(value for name, value in found.items() if 'result="hit"' in name)
    misses = sum(value for name, value in found.items() if 'result="miss"' in name)
    short = {name.partition("{")[0]: value for name, value in found.items() if "lookups" not in name}
    short = {name: value for name, value in short.items() if not name.endswith(("bucket", "created", "sum"))}
    return short | ({"hit_ratio": round(hits / (hits + misses), 3)} if hits + misses else {})


@contextmanager
def watched(worker: WorkerProcess) -> Iterator[dict[str, int]]:
    """The most memory that front and engine had for themselves at any moment (anonymous pages, bytes)."""
    peak: dict[str, int] = {}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            for pid in (worker.server.pid, *children_of(worker.server.pid)):
                name = "front" if pid == worker.server.pid else "engine"
                peak[name] = max(peak.get(name, 0), resident_bytes(pid))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def children_of(pid: int) -> list[int]:
    """The processes that a process has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


def resident_bytes(pid: int) -> int:
    """Resident memory of a process, 0 when it has ended."""
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except OSError:
        return 0
    return pages * os.sysconf("SC_PAGE_SIZE")


def throttled(kafka: KafkaCluster, model: Path, adapter: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Streams beside a slow download."""
    server = WebServer()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    for name in (*(f"quick-{i}" for i in range(STREAMS)), "slow"):
        server.files |= {f"/{name}/{file}": (adapter / file).read_bytes() for file in (CONFIG, WEIGHTS)}
    server.throttled[f"/slow/{WEIGHTS}"] = SLOW_SECONDS
    server.ranges = False
    flags = {"adapter_uri": f"{server.url}/{{adapter_id}}", "adapter_timeout": "60s", "max_model_len": 1024}
    try:
        with WorkerProcess(kafka.bootstrap_servers, model, **flags):
            return asyncio.run(compare_gaps(kafka.bootstrap_servers))
    finally:
        server.ended.set()
        server.shutdown()
        server.server_close()


async def compare_gaps(servers: str) -> dict[str, Any]:
    """Gaps between tokens of the streams in three stretches: alone, beside the download, alone again."""
    gaps: list[float] = []
    async with Client(bootstrap_servers=servers, timeout=600) as client:

        async def stream(number: int) -> None:
            while True:
                last = None
                fields: dict[str, Any] = {"adapter_id": f"quick-{number}", "max_new_tokens": 900, "ignore_eos": True}
                async for delta in client.stream("go on", **fields):
                    now = time.perf_counter()
                    if last is not None:
                        gaps.extend([(now - last) / len(delta.token_ids)] * len(delta.token_ids))
                    last = now

        async def stretch(seconds: float) -> dict[str, float]:
            await asyncio.sleep(1)
            gaps.clear()
            await asyncio.sleep(seconds)
            found = sorted(gaps)
            return {"tokens": len(found), "p50_ms": _at(found, 0.5), "p99_ms": _at(found, 0.99)}

        streams = [asyncio.create_task(stream(i)) for i in range(STREAMS)]
        await stretch(3)  # adapters arrive, code paths are warm
        before = await stretch(SLOW_SECONDS - 4)
        begun = time.perf_counter()
        slow = asyncio.create_task(client.generate("hello", adapter_id="slow", max_new_tokens=4))
        beside = await stretch(SLOW_SECONDS - 4)
        assert not slow.done(), "the download ended too soon"
        await slow
        waited = time.perf_counter() - begun
        after = await stretch(SLOW_SECONDS - 4)
        for task in streams:
            task.cancel()
        await asyncio.gather(*streams, return_exceptions=True)
    alone = statistics.mean((before["p99_ms"], after["p99_ms"]))
    return {
        "before": before,
        "beside": beside,
        "after": after,
        "p99_ratio": round(beside["p99_ms"] / alone, 3),
        "slow_request_seconds": round(waited, 1),
    }


def _at(ordered: list[float], share: float) -> float:
    return round(ordered[int(share * (len(ordered) - 1))] * 1e3, 2)


if __name__ == "__main__":
    main()
