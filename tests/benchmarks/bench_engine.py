"""What the engine takes on a GPU: decode steps, prefill, one request alone, and a crowd.

    python tests/benchmarks/bench_engine.py [--shape 8b|1b] [--only steps,…] [--against peft]

Random weights of the true shape, bf16, adapters of `--rank` on `--modules`, all resident unless said otherwise. The
last line of the output is a JSON object with machine, versions and figures; times are in milliseconds. The byte floor
of a step is weights, the batch's adapters and keys and values over the bandwidth of a copy on this device.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from gpu_rig import (
    ALL_LINEARS,
    Rig,
    adapter_layout,
    copy_bandwidth,
    median_of_replays,
    pool_memory,
    random_model,
    write_adapter,
)
from machine import describe_machine
from peft_on_gpu import peft_figures
from step_profile import profile_steps

from loramux_worker.engine.protocol import AdapterReference

PROMPT, NEW = 64, 128


def main() -> None:
    """Run what was asked for and print the figures."""
    arguments = _arguments()
    torch.set_grad_enabled(False)
    model = random_model(arguments.shape, layers=arguments.layers)
    bandwidth = copy_bandwidth()
    modules = arguments.modules.split(",")
    layout = adapter_layout(model, arguments.rank, modules)
    adapter_bytes = layout.num_elements * model.dtype.itemsize
    most = max(arguments.batches)
    crowded = arguments.crowd_sequences if "crowd" in arguments.only else 0
    crowd = random.Random(1).choices(range(1000), [1 / (i + 1) for i in range(1000)], k=512)  # Zipf(1)
    resident = max(most, len(set(crowd)))
    rig = Rig.make(
        model,
        max_model_len=1024,
        max_batch_sequences=max(most, crowded),
        max_batched_tokens=4096,
        max_batch_ranks=1 << 20,
        kv_cache_memory=(max(most, crowded) + 8) * 256 * model.kv_bytes_per_token,
        adapter_memory=(resident + 1) * adapter_bytes + (1 << 20),
        host_memory=(resident + 1) * adapter_bytes,
    )
    graphs = rig.parts.runner.graphs
    figures: dict[str, Any] = {
        "copy_bandwidth_TB_s": round(bandwidth / 1e12, 3),
        "adapter_bytes": adapter_bytes,
        "weight_bytes": _weight_bytes(model),
    }
    if graphs is not None:
        figures["graphs"] = {"count": len(graphs), "seconds": round(graphs.seconds, 1), "bytes": graphs.num_bytes}
        print(f"graphs: {figures['graphs']}", flush=True)
    try:
        for part in [*arguments.only.split(","), *arguments.against]:
            rig.evict_adapters()  # of the part before
            adapters = rig.load_adapters([arguments.rank] * resident, modules)
            mixes = {"base": [None], "one": adapters[:1], "distinct": adapters}
            if part == "steps":
                figures["steps"] = _steps(rig, arguments.batches, mixes, adapter_bytes, bandwidth)
            elif part == "prefill":
                figures["prefill"] = _prefill(rig, mixes)
            elif part == "alone":
                figures["alone"] = _alone(rig, mixes)
            elif part == "crowd":
                figures["crowd"] = _crowd(rig, arguments, crowd, adapters)
            elif part == "ranks":
                figures["ranks"] = _ranks(rig, modules, bandwidth)
            elif part == "pool":
                figures["pool"] = pool_memory(model, 1000, 8, ("q_proj", "v_proj"))
                print("pool", figures["pool"], flush=True)
            elif part == "profile":
                zipf = [adapters[i] for i in _by_first_use(crowd)]
                chosen = [batch for batch in arguments.batches if batch in (1, 64, 256)]
                chosen += [crowded] if crowded else []
                figures["profile"] = profile_steps(rig, chosen, mixes | {"zipf": zipf})
            elif part == "peft":
                figures["peft"] = peft_figures(arguments.shape, arguments.rank, modules, arguments.layers)
            else:
                raise SystemExit(f"--only {part}: say steps, prefill, alone, ranks, crowd, pool or profile")
    finally:  # what was measured before an interruption is not lost
        document = {"benchmark": "engine", "shape": arguments.shape, **describe_machine(), **figures}
        print(json.dumps(document))


def _steps(
    rig: Rig, batches: list[int], mixes: dict[str, Any], adapter_bytes: int, bandwidth: float
) -> list[dict[str, Any]]:
    """Decode steps at a mean context of 128: what the engine takes, and what the device takes at the end's context."""
    rows = []
    for batch in batches:
        for mix, adapters in mixes.items():
            distinct = {"base": 0, "one": 1, "distinct": batch}[mix]
            rig.submit(batch, PROMPT, 8, adapters)  # warm up
            rig.drain()
            rig.submit(batch, PROMPT, NEW, adapters)
            seconds = rig.drain(most_steps=NEW // 2 + batch * PROMPT // 4096)
            device = _device_ms(rig)  # in the middle, at the mean context
            seconds += rig.drain()
            step = statistics.median(seconds[batch * PROMPT // 4096 + 2 :])
            kv = batch * (PROMPT + NEW // 2) * rig.model.kv_bytes_per_token
            floor = (_weight_bytes(rig.model) + distinct * adapter_bytes + kv) / bandwidth
            row = {
                "batch": batch,
                "mix": mix,
                "step_ms": round(step * 1e3, 3),
                "device_ms": device,
                "floor_ms": round(floor * 1e3, 3),
                "ratio": round(step / floor, 2),
                "tokens_per_s": round(batch / step),
            }
            rows.append(row)
            print(row, flush=True)
    return rows


def _device_ms(rig: Rig) -> float | None:
    """The last step's graph alone, replayed over the same inputs."""
    runner = rig.parts.runner
    if runner.graphs is None or runner.graphs.last is None:
        return None
    key = runner.graphs.last
    return round(median_of_replays(lambda: runner.graphs.replay(key)) * 1e3, 3)


def _prefill(rig: Rig, mixes: dict[str, Any]) -> list[dict[str, Any]]:
    """64 prompts of 64 tokens in one step."""
    rows = []
    for mix, adapters in mixes.items():
        times = []
        for _ in range(6):
            rig.submit(64, 64, 1, adapters)
            times.append(sum(rig.drain()))
        rows.append({"mix": mix, "ms": round(statistics.median(times[1:]) * 1e3, 2)})
        print("prefill", rows[-1], flush=True)
    return rows


def _alone(rig: Rig, mixes: dict[str, Any]) -> list[dict[str, Any]]:
    """One request at a time: 70 prompt tokens, 10 new ones."""
    rows = []
    for mix in ("base", "distinct"):
        times = []
        for i in range(24):
            adapter = mixes[mix][i % len(mixes[mix])]
            rig.submit(1, 70, 10, [adapter])
            times.append(sum(rig.drain()))
        rows.append({"mix": mix, "ms": round(statistics.median(times[4:]) * 1e3, 2)})
        print("alone", rows[-1], flush=True)
    return rows


def _ranks(rig: Rig, modules: list[str], bandwidth: float) -> dict[str, Any]:
    """A step of 64 rows: 63 adapters of rank 8 beside one of rank 256, and what their bytes would say."""
    rig.evict_adapters()
    adapters = rig.load_adapters([8] * 63 + [256], modules, prefix="ranks")
    figures: dict[str, Any] = {}
    for mix, chosen in (("base", [None]), ("rank 8 alone", adapters[:63] + adapters[:1]), ("mixed", adapters)):
        rig.submit(64, PROMPT, NEW, chosen)
        figures[mix] = round(statistics.median(rig.drain()[3:]) * 1e3, 3)
    by_bytes = (63 * 8 + 256) * adapter_layout(rig.model, 1, modules).num_elements * rig.model.dtype.itemsize
    figures["by_bytes"] = round(figures["base"] + by_bytes / bandwidth * 1e3, 3)
    figures["ratio"] = round(figures["mixed"] / figures["by_bytes"], 3)
    print("ranks", figures, flush=True)
    rig.evict_adapters()
    return figures


def _crowd(rig: Rig, arguments: argparse.Namespace, drawn: list[int], resident: list[Any]) -> dict[str, Any]:
    """512 requests at once, adapters drawn Zipf(1) from 1,000: none, all in the pool, all in local files."""
    warm = [resident[i] for i in _by_first_use(drawn)]
    with tempfile.TemporaryDirectory() as folder:
        path = str(write_adapter(Path(folder), rig.model, arguments.rank, arguments.modules.split(",")))
        cold = [AdapterReference(f"cold-{adapter}", "sha256:0", path) for adapter in drawn]
        figures: dict[str, Any] = {"distinct": len(set(drawn))}
        cases = {"base": [None] * 512, "warm": warm, "cold": cold, "cold again": cold}
        for mix, chosen in cases.items():
            if mix.startswith("cold"):  # again: a system may give its programs memory slowly the first time
                rig.evict_adapters()
            else:
                rig.submit(512, PROMPT, 8, chosen)
                rig.drain()
            started = time.perf_counter()
            rig.submit(512, PROMPT, NEW, chosen)
            rig.drain()
            figures[mix] = {"tokens_per_s": round(512 * NEW / (time.perf_counter() - started))}
            print("crowd", mix, figures[mix], flush=True)
    return figures


def _by_first_use(drawn: list[int]) -> list[int]:
    """The same draws with the distinct ones numbered from 0 in the order of their first."""
    numbers = {adapter: i for i, adapter in enumerate(dict.fromkeys(drawn))}
    return [numbers[adapter] for adapter in drawn]


def _weight_bytes(model: Any) -> int:
    """Bytes of the weights that a decode step reads: all but the embedding table."""
    embedding = model.module.get_input_embeddings().weight
    parameters = {p.data_ptr(): p.numel() for p in model.module.parameters() if p.data_ptr() != embedding.data_ptr()}
    return sum(parameters.values()) * model.dtype.itemsize


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("1b", "8b"), default="8b")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for a quick look")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--modules", default=",".join(ALL_LINEARS))
    parser.add_argument(
        "--batches", type=lambda text: [int(b) for b in text.split(",")], default=[1, 8, 32, 64, 128, 256]
    )
    parser.add_argument("--crowd-sequences", type=int, default=512, help="--max-batch-sequences of the crowd")
    parser.add_argument(
        "--only",
        default="steps,prefill,alone,ranks,crowd",
        help="parts by commas: steps, prefill, alone, ranks, crowd, pool, profile",
    )
    parser.add_argument("--against", choices=("peft",), action="append", default=[], help="run it beside, on the GPU")
    return parser.parse_args()


if __name__ == "__main__":
    main()
