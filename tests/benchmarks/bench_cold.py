"""What an adapter that is not on the device costs: the request that waits for it, and those that do not.

    python tests/benchmarks/bench_cold.py [--only alone,beside,begin] [--shape 8b|1b|tiny] [--device cuda|cpu]

alone: one request for an adapter in object storage (a real S3 server on loopback), through the worker's own store,
disk tier, host tier and pool, beside the same request for a resident adapter; and what the download alone takes.
beside: 64 sequences with 64 resident adapters decode while 100 others come from local files into host tier and pool,
beside the same steps without.
begin: beside 64 sequences that decode others begin, several in one step, with adapters in the host tier or in the pool.
Random weights of the true shape, bf16 on a GPU, adapters of `--rank` on all linears.

The last line of the output is a JSON object; times are in milliseconds unless a name says otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import obstore
import torch
import uvloop
from cold_begins import MOST_BEGIN, compare_begins
from cold_loads import compare_steps
from gpu_rig import Rig, adapter_layout, random_model, write_adapter
from machine import describe_machine
from obstore.store import S3Store

from loramux_schemas import AdapterName
from loramux_worker.adapters.catalog import AdapterCatalog
from loramux_worker.adapters.disk import DiskTier
from loramux_worker.adapters.store import CONFIG_FILE, WEIGHTS_FILE, AdapterStore
from loramux_worker.adapters.transfer import PARALLEL_PARTS, PART_BYTES
from loramux_worker.engine.protocol import AdapterReference
from loramux_worker.logs import configure_logs
from services.s3 import S3Server

PROMPT, NEW = 70, 8
LINK = 55e9  # bytes a second from host to device


def main() -> None:
    """Run what was asked for and print the figures."""
    arguments = _arguments()
    configure_logs(level="warning")
    torch.set_grad_enabled(False)
    model = random_model(
        arguments.shape,
        device=arguments.device,
        dtype=torch.bfloat16 if arguments.device == "cuda" else torch.float32,
        layers=arguments.layers,
    )
    adapter_bytes = adapter_layout(model, arguments.rank).num_elements * model.dtype.itemsize
    most = max(arguments.sequences + arguments.loads, arguments.cold + 1) + 1
    sequences = arguments.sequences + (MOST_BEGIN if "begin" in arguments.only else 0)
    rig = Rig.make(
        model,
        device=arguments.device,
        max_model_len=2048,
        max_batch_sequences=sequences,
        max_batched_tokens=4096,
        max_batch_ranks=1 << 20,
        kv_cache_memory=(sequences + 1) * 2048 * model.kv_bytes_per_token,
        adapter_memory=most * adapter_bytes + (1 << 20),
        host_memory=max(arguments.loads, arguments.cold) * adapter_bytes,
    )
    gc.collect()
    gc.freeze()  # as an engine process does
    figures: dict[str, Any] = {"adapter_bytes": adapter_bytes}
    try:
        for part in arguments.only.split(","):
            with tempfile.TemporaryDirectory(prefix="loramux-bench-", dir=arguments.folder) as folder:
                figures[part] = PARTS[part](rig, Path(folder), arguments)
            print(part, json.dumps(figures[part], indent=1), flush=True)
    finally:  # what was measured before an interruption is not lost
        settings = {name: value for name, value in vars(arguments).items() if name not in ("only", "folder")}
        print(json.dumps({"benchmark": "cold", **describe_machine(), "settings": settings, **figures}))


def alone(rig: Rig, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """One request at a time, its adapter resident, then in S3; each cold adapter once a round, from empty tiers."""
    (resident,) = rig.load_adapters([arguments.rank])
    with S3Server() as s3:
        os.environ.update(s3.environment)
        store = s3.store(s3.create_bucket("adapters"))
        names = [f"cold-{i}" for i in range(arguments.cold)]
        for name in names:
            put_adapter(store, name, write_adapter(folder / "new", rig.model, arguments.rank))
        warm = [first_token(rig, resident) for _ in range(20)][4:]
        raw = [uvloop.run(download(store, f"{names[i % len(names)]}/{WEIGHTS_FILE}")) for i in range(12)][2:]
        rounds = [uvloop.run(cold_round(rig, folder / f"disk-{i}", names)) for i in range(3)]
    transfer = rig.parts.adapters.pool.elements.itemsize * adapter_layout(rig.model, arguments.rank).num_elements / LINK
    warm_s, raw_s = statistics.median(warm), statistics.median(raw)
    return {
        "warm_ms": _ms(warm_s),
        "raw_download_ms": _ms(raw_s),
        "raw_download_GB_s": round(transfer * LINK / raw_s / 1e9, 2),
        "link_ms": _ms(transfer),
        "rounds": [_cold_figures(rows, warm_s, raw_s, transfer) for rows in rounds],
    }


def put_adapter(store: S3Store, name: str, folder: Path) -> None:
    """Both files of an adapter under its name."""
    for file in (CONFIG_FILE, WEIGHTS_FILE):
        store.put(f"{name}/{file}", folder / file)


async def download(store: S3Store, key: str) -> float:
    """Seconds for the weights alone, in ranges like the worker's and as many at once, into memory and no further."""
    size = (await store.head_async(key))["size"]
    slots = asyncio.Semaphore(PARALLEL_PARTS)

    async def part(first: int) -> int:
        async with slots:
            return len(await obstore.get_range_async(store, key, start=first, end=min(first + PART_BYTES, size)))

    began = time.perf_counter()
    lengths = await asyncio.gather(*map(part, range(0, size, PART_BYTES)))
    seconds = time.perf_counter() - began
    assert sum(lengths) == size
    return seconds


async def cold_round(rig: Rig, disk: Path, names: list[str]) -> list[dict[str, float]]:
    """Each adapter's first request with an empty disk tier, host tier and pool; seconds of its parts."""
    rows = []
    catalog = AdapterCatalog(
        AdapterStore("s3://adapters/{adapter_id}"), DiskTier(disk, 1 << 40), revision_ttl=3600, adapter_timeout=60
    )
    try:
        for name in names:
            began = time.perf_counter()
            reference = await catalog.acquire(AdapterName.parse(name))
            fetched = time.perf_counter() - began
            engine = first_token(rig, reference)
            moved = {move.tier: move.seconds for move in rig.moves if move.adapter == reference}
            rows.append({"cold": fetched + engine, "fetch": fetched, "host": moved["host"], "pool": moved["gpu"]})
            catalog.release(reference)
    finally:
        await catalog.close()
    shutil.rmtree(disk)
    rig.evict_adapters()
    return rows


def first_token(rig: Rig, adapter: AdapterReference) -> float:
    """Seconds from a request's coming to the engine to its first token; then it is brought to its end."""
    engine = rig.parts.engine
    began = time.perf_counter()
    rig.submit(1, PROMPT, NEW, [adapter])
    while not rig.outputs:
        if not engine.step():
            time.sleep(0.001)  # as an engine process does: the adapter is on its way, in a thread
    seconds = time.perf_counter() - began
    rig.drain()
    return seconds


def _cold_figures(
    rows: list[dict[str, float]], warm: float, raw: float, transfer: float
) -> dict[str, float | list[float]]:
    medians = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    added = medians["cold"] - warm
    return {
        **{f"{name}_ms": _ms(value) for name, value in medians.items()},
        "rest_ms": _ms(medians["cold"] - medians["fetch"] - medians["host"]),
        "added_ms": _ms(added),
        "of_raw_download": round(added / (raw + transfer), 3),
        "of_fetch": round(added / (medians["fetch"] + transfer), 3),
        "each_cold_ms": [_ms(row["cold"]) for row in rows],
    }


def beside(rig: Rig, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """64 sequences decode while 100 adapters come in."""
    paths = write_adapters(rig, folder, arguments.loads, arguments.rank)
    others = [references(paths, name) for name in "ab"]
    resident = rig.load_adapters([arguments.rank] * arguments.sequences, prefix="decoding")
    return compare_steps(rig, resident, others, arguments.rounds)


def begin(rig: Rig, folder: Path, arguments: argparse.Namespace) -> list[Any]:
    """64 sequences decode while up to 32 more begin at once."""
    others = references(write_adapters(rig, folder, min(MOST_BEGIN, arguments.loads), arguments.rank), "begins")
    resident = rig.load_adapters([arguments.rank] * arguments.sequences, prefix="decoding")
    return compare_begins(rig, resident, others)


def write_adapters(rig: Rig, folder: Path, count: int, rank: int) -> list[Path]:
    """As many folders with the same weights."""
    original = write_adapter(folder / "0", rig.model, rank)
    return [original, *(Path(shutil.copytree(original, folder / str(i))) for i in range(1, count))]


def references(paths: Sequence[Path], name: str) -> list[AdapterReference]:
    """Adapters of that name, numbered, one a folder."""
    return [AdapterReference(f"{name}-{i}", "sha256:0", str(path)) for i, path in enumerate(paths)]


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 3)


PARTS = {"alone": alone, "begin": begin, "beside": beside}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("8b", "1b", "tiny"), default="8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for a quick look")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--cold", type=int, default=10, help="adapters in object storage (default 10)")
    parser.add_argument("--sequences", type=int, default=64, help="that decode (default 64)")
    parser.add_argument("--loads", type=int, default=100, help="adapters that come in beside them (default 100)")
    parser.add_argument("--rounds", type=int, default=3, help="times that both are measured, in turn (default 3)")
    parser.add_argument("--only", default="alone,beside", help="parts by commas (default both)")
    parser.add_argument("--folder", type=Path, help="where the adapters' files go (default: the temporary folder)")
    return parser.parse_args()


if __name__ == "__main__":
    main()
