"""One adapter floods, 20 others ask now and then: what these feel of it, through real Kafka and one worker.

    PYTHONPATH=tests python tests/benchmarks/bench_fairness.py [--flood 5000] [--seconds 30] [--device cpu]

The demo model and copies of its adapters, or a random model of `--shape` and adapters of rank 16 on all its linears.
The flood comes at once from a plain producer that takes the adapter as key, so all of it stands in one partition; each
light adapter asks at its rate, as a stream, for `--seconds` without the flood and then for as long as the flood takes.
A time to the first token is the client's: from asking to the first delta, Kafka there and back. Throughput is all
tokens, of prompts and answers, while the flood lasts; and beside it until the light requests that were asked meanwhile
are answered too, for first come, first served leaves these, and what it costs to have many adapters in a step, for
afterwards.

The worker is measured as it is, then again as one that serves first come, first served (`first_come/`). The last line
of the output is a JSON object.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from confluent_kafka import Producer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import describe_machine
from loramux_producer import Client
from loramux_schemas import Request
from services.kafka import KafkaCluster
from services.worker import WorkerProcess, worker_topics

DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo"
FIRST_COME = Path(__file__).resolve().parent / "first_come"
HEAVY = "heavy"
LIGHT = tuple(f"light/{i}" for i in range(20))
HEAP = ("-Xms1g", "-Xmx1g", "-Xmn640m")  # of the broker: the tests' small one stops for 70 ms every few seconds
POLICIES = ("loramux", "first come")


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flood", type=int, default=5000, help="requests of the adapter that floods (default 5000)")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long to measure without it (default 30)")
    parser.add_argument("--rate", type=float, default=1.0, help="requests a second of each light one (default 1)")
    parser.add_argument("--new-tokens", type=int, default=16, help="tokens to generate a request (default 16)")
    parser.add_argument("--partitions", type=int, default=4, help="of the requests topic (default 4)")
    parser.add_argument("--batch", type=int, default=64, help="--max-batch-sequences of the worker (default 64)")
    parser.add_argument("--device", default="cpu", help="of the worker (default cpu)")
    parser.add_argument("--shape", choices=("demo", "1b", "tiny"), default="demo", help="of the model (default demo)")
    parser.add_argument("--layers", type=int, help="fewer layers than the shape has, for a quick look")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loramux-bench-") as folder, KafkaCluster(java=HEAP) as kafka:
        model, adapters = model_and_adapters(Path(folder), options)
        figures = {policy: asyncio.run(measure(policy, kafka, model, adapters, options)) for policy in POLICIES}
    print_table(figures)
    settings = vars(options) | {"light_adapters": len(LIGHT)}
    print(
        json.dumps({"benchmark": "fairness", "machine": describe_machine(), "settings": settings, "figures": figures})
    )


def model_and_adapters(folder: Path, options: argparse.Namespace) -> tuple[Path, Path]:
    """The folders of the model and of its adapters under the names of this benchmark: the demo's in turn, or random."""
    if options.shape != "demo":
        from random_shape import save_shape

        return save_shape(
            folder, options.shape, (HEAVY, *LIGHT), device=options.device.partition(":")[0], layers=options.layers
        )
    originals = sorted(config.parent for config in DEMO.glob("adapters/*/*/adapter_config.json"))
    for name, original in zip((HEAVY, *LIGHT), itertools.cycle(originals), strict=False):
        shutil.copytree(original, folder / name)
    return DEMO / "model", folder


@contextmanager
def worker_with(
    policy: str, kafka: KafkaCluster, model: Path, adapters: Path, options: argparse.Namespace
) -> Iterator[tuple[WorkerProcess, dict[str, str]]]:
    """A worker on topics of its own, which are returned too."""
    topics = worker_topics(
        lambda name, count: new_topic(kafka, f"{name}-{policy.split()[0]}", count), options.partitions
    )
    flags = {
        "adapter_uri": f"file://{adapters}/{{adapter_id}}",
        "group_id": topics["requests_topic"],
        "device": options.device,
        "max_batch_sequences": options.batch,
        **topics,
    }
    if options.shape != "demo":  # what is asked for here is small beside a GPU
        flags |= {"max_model_len": 512, "kv_cache_memory": "1GiB", "adapter_memory": "1GiB", "host_memory": "1GiB"}
    environment = None
    if policy == "first come":
        environment = {"PYTHONPATH": os.pathsep.join([str(FIRST_COME), *filter(None, [os.environ.get("PYTHONPATH")])])}
        flags["adapter_look_ahead"] = 0.9999  # all seats to those who came first
    with WorkerProcess(kafka.bootstrap_servers, model, environment=environment, **flags) as worker:
        rival = worker.log_path.read_text().count("first come, first served")
        assert rival == (2 if policy == "first come" else 0), "front and engine are what they are said to be"
        yield worker, topics


def new_topic(kafka: KafkaCluster, name: str, partitions: int) -> str:
    """A topic of that name."""
    kafka.create_topic(name, partitions)
    return name


async def measure(
    policy: str, kafka: KafkaCluster, model: Path, adapters: Path, options: argparse.Namespace
) -> dict[str, Any]:
    """Times to the first token of the light ones without and with the flood, and the throughput."""
    say(f"{policy}: starting a worker")
    with worker_with(policy, kafka, model, adapters, options) as (worker, topics):
        own = {name: topic for name, topic in topics.items() if name != "dead_letter_topic"}
        async with Client(kafka.bootstrap_servers, timeout=900, **own) as client:
            for name in (HEAVY, *LIGHT):
                await first_token(client, name, options)
            say(f"{policy}: {options.seconds:g} s without the flood")
            before = await light_load(client, options, asyncio.create_task(asyncio.sleep(options.seconds)))
            if statistics.median(before) > 1.0:  # then the light ones alone keep it busy, and rightly before the flood
                raise SystemExit("the light requests alone are more than the worker can do now: a lower --rate")
            say(f"{policy}: {options.flood} requests of one adapter")
            values = flood_values(options)
            tokens, began = await asyncio.to_thread(worker.metric, "loramux_tokens_total"), time.perf_counter()
            flood = asyncio.create_task(flooding(kafka, worker, topics["requests_topic"], values, options))
            during = await light_load(client, options, flood)
            seconds = time.perf_counter() - began
            tokens = await asyncio.to_thread(worker.metric, "loramux_tokens_total") - tokens
    whole = {"all_answered_seconds": seconds, "all_answered_tokens_per_second": tokens / seconds}
    return {"without": summary(before), "with": summary(during), **flood.result(), **whole}


async def light_load(client: Client, options: argparse.Namespace, until: asyncio.Task[Any]) -> list[float]:
    """Requests of each light adapter at its rate until the task is done; seconds to the first token of each."""
    asks = []
    began = time.perf_counter()
    for number in itertools.count():
        due = began + number / (options.rate * len(LIGHT))
        await asyncio.wait([until], timeout=max(0.0, due - time.perf_counter()))
        if until.done():
            break
        asks.append(asyncio.create_task(first_token(client, LIGHT[number % len(LIGHT)], options)))
    return await asyncio.gather(*asks)


async def first_token(client: Client, adapter_id: str, options: argparse.Namespace) -> float:
    """Ask for a stream and read it to its end; seconds to its first delta."""
    began, first = time.perf_counter(), None
    async for _ in client.stream("Where is my order 4821?", adapter_id=adapter_id, **parameters(options)):
        first = first or time.perf_counter() - began
    assert first is not None, "an answer has tokens"
    return first


def flood_values(options: argparse.Namespace) -> list[bytes]:
    """The requests that flood."""
    return [
        Request(
            request_id=f"flood-{i}", adapter_id=HEAVY, prompt=f"Where is my order {i}?", parameters=parameters(options)
        ).to_json()
        for i in range(options.flood)
    ]


def send(kafka: KafkaCluster, topic: str, values: list[bytes]) -> None:
    """Send the flood, beside the event loop: its time is also that of those who ask now and then."""
    producer = Producer({"bootstrap.servers": kafka.bootstrap_servers, "linger.ms": 5})
    for value in values:
        producer.produce(topic, value, key=HEAVY.encode())
    producer.flush()


async def flooding(
    kafka: KafkaCluster, worker: WorkerProcess, topic: str, values: list[bytes], options: argparse.Namespace
) -> dict[str, float]:
    """Send the flood and wait for its end."""
    tokens = await asyncio.to_thread(worker.metric, "loramux_tokens_total")
    done = await asyncio.to_thread(answered, worker)
    began = time.perf_counter()
    await asyncio.to_thread(send, kafka, topic, values)
    sent = time.perf_counter() - began
    while (left := done + options.flood - await asyncio.to_thread(answered, worker)) > 0:
        rate = (options.flood - left) / (time.perf_counter() - began)
        await asyncio.sleep(min(1.0, max(0.05, left / rate / 2)) if rate else 0.2)  # who asks often costs something too
    seconds = time.perf_counter() - began
    tokens = await asyncio.to_thread(worker.metric, "loramux_tokens_total") - tokens
    return {"flood_sent_seconds": sent, "flood_seconds": seconds, "tokens_per_second": tokens / seconds}


def answered(worker: WorkerProcess) -> int:
    """Requests of the adapter that floods which were answered with text."""
    start = f'loramux_requests_total{{adapter="{HEAVY}",outcome="ok"}} '
    lines = [line for line in worker.get("/metrics").splitlines() if line.startswith(start)]
    return sum(int(float(line.rpartition(" ")[2])) for line in lines)


def parameters(options: argparse.Namespace) -> dict[str, Any]:
    """Exactly as many tokens."""
    return {"max_new_tokens": options.new_tokens, "ignore_eos": True}


def summary(seconds: list[float]) -> dict[str, float]:
    """How many, and their percentiles in milliseconds."""
    cuts = statistics.quantiles(seconds * 2, n=100, method="inclusive")  # twice: one alone has percentiles too
    return {"requests": len(seconds), "p50_ms": cuts[49] * 1000, "p99_ms": cuts[98] * 1000}


def print_table(figures: dict[str, dict[str, Any]]) -> None:
    """The figures for a person."""
    title = "light: p50 / p99 to the first token"
    print(f"{title}  {'without':>17}  {'with the flood':>19}  p99 ×   tokens/s   to the end")
    for policy, row in figures.items():
        before, during = row["without"], row["with"]
        times = during["p99_ms"] / before["p99_ms"] if before["p99_ms"] else 0.0
        cells = [f"{each['p50_ms']:.0f} / {each['p99_ms']:.0f} ms" for each in (before, during)]
        print(
            f"{policy:35}  {cells[0]:>17}  {cells[1]:>19}  {times:5.1f}  {row['tokens_per_second']:9.0f}"
            f"  {row['all_answered_tokens_per_second']:11.0f}"
        )
    for name, until in (
        ("tokens_per_second", "while the flood lasts"),
        ("all_answered_tokens_per_second", "to the end"),
    ):
        ours, rival = (figures[policy][name] for policy in POLICIES)
        print(f"throughput {until} beside first come, first served: {ours / rival:.1%}")


def say(what: str) -> None:
    """Progress, on standard error."""
    print(f"… {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
