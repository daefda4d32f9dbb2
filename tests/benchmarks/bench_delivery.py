"""What exactly-once costs beside at-least-once, at a fixed rate of replies on a real Apache Kafka.

    PYTHONPATH=tests python tests/benchmarks/bench_delivery.py [--rate 500] [--seconds 15] [--partitions 12]

The worker's own front with an answer that takes no time, in a process of its own, so that what is measured is Kafka
and our delivery. The modes take turns in one run; each round asks at the rate, then as fast as it can. The first
round of each is not counted: a broker that has just started is compiling what it does for the first time. A latency
is the time from producing the request to reading its reply (read_committed). The last line of the output is a JSON
object.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import multiprocessing
import statistics
import time
import uuid
from multiprocessing.synchronize import Event

import uvloop
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from benchmarks.machine import describe_machine
from loramux_schemas import KafkaConnection
from loramux_worker.cancellations import Cancellations
from loramux_worker.front import Front
from loramux_worker.kafka.commits import PlainCommits
from loramux_worker.kafka.delivery import AtLeastOnce
from loramux_worker.kafka.exactly_once import ExactlyOnce
from loramux_worker.kafka.intake import Intake
from loramux_worker.kafka.publisher import Publisher
from loramux_worker.kafka.records import OutgoingRecord, Record
from loramux_worker.logs import configure_logs
from loramux_worker.look_ahead import Window
from loramux_worker.stopwatch import Stopwatch
from services.kafka import KafkaCluster

MODES = ("at_least_once", "exactly_once")
BODY = "x" * 500  # a reply is about this long


def serve(mode: str, servers: str, requests: str, replies: str, ready: Event, stop: Event) -> None:
    """A front that answers at once, until `stop`."""
    configure_logs("text", "warning")
    uvloop.run(_serve(mode, servers, requests, replies, ready, stop))


async def _serve(mode: str, servers: str, requests: str, replies: str, ready: Event, stop: Event) -> None:
    connection = KafkaConnection(bootstrap_servers=servers)
    publisher = Publisher(connection, topics=[replies])
    await publisher.start()
    group = {"topic": requests, "group_id": requests}
    exactly_once = ExactlyOnce(connection, **group, publisher=publisher) if mode == "exactly_once" else None
    commits = exactly_once or PlainCommits(connection, **group)
    intake = Intake(connection, **group, commits=commits, on_lost=lambda lost: None)

    async def answer(record: Record, watch: Stopwatch) -> tuple[OutgoingRecord, ...]:
        return (OutgoingRecord(replies, record.key, (record.value or b"") + BODY.encode()),)

    delivery = exactly_once or AtLeastOnce(publisher, intake)
    window = Window(seats=4096, share=0.75, max_parked=8192, max_parked_bytes=64 << 20)
    front = Front(intake, answer, None, publisher, delivery, window, Cancellations(60.0))
    await intake.start()
    taking = asyncio.create_task(front.take_requests())
    while not intake.assigned:  # noqa: ASYNC110 - the group tells nobody
        await asyncio.sleep(0.05)
    ready.set()
    await asyncio.to_thread(stop.wait)
    await front.drain(5.0)
    await taking
    await intake.close()
    await publisher.close()


async def measure(servers: str, requests: str, replies: str, rate: float, count: int) -> tuple[float, list[float]]:
    """Replies per second, and the latency of each in seconds; `rate` inf asks as fast as it can."""
    async with (
        AIOKafkaConsumer(replies, bootstrap_servers=servers, isolation_level="read_committed") as reader,
        AIOKafkaProducer(bootstrap_servers=servers, acks="all", linger_ms=1) as producer,
    ):
        for name in reader.assignment():
            await reader.position(name)
        asking = asyncio.create_task(_ask(producer, requests, rate, count))
        began, latencies = time.perf_counter(), []
        limit = time.perf_counter() + 60 + count / rate
        while len(latencies) < count:
            if time.perf_counter() > limit:
                raise SystemExit(f"only {len(latencies)} of {count} replies came")
            for messages in (await reader.getmany(timeout_ms=1000)).values():
                now = time.perf_counter()
                latencies += [now - float(message.value[: -len(BODY)]) for message in messages]
        await asking
        return count / (time.perf_counter() - began), latencies


async def _ask(producer: AIOKafkaProducer, requests: str, rate: float, count: int) -> None:
    began = time.perf_counter()
    for i in range(count):
        if (ahead := began + i / rate - time.perf_counter()) > 0:
            await asyncio.sleep(ahead)
        await producer.send(requests, repr(time.perf_counter()).encode(), key=uuid.uuid4().bytes)


async def lag(servers: str, topic: str) -> int:
    """How far the group is behind the ends of the topic."""
    async with AIOKafkaConsumer(bootstrap_servers=servers, group_id=topic, enable_auto_commit=False) as consumer:
        await consumer.topics()
        names = [TopicPartition(topic, number) for number in consumer.partitions_for_topic(topic) or ()]
        ends = await consumer.end_offsets(names)
        return sum([ends[name] - (await consumer.committed(name) or 0) for name in names])


def run(mode: str, kafka: KafkaCluster, options: argparse.Namespace) -> dict[str, float]:
    """One round of a mode on topics of its own."""
    requests, replies = (f"{name}-{uuid.uuid4().hex[:8]}" for name in ("requests", "replies"))
    kafka.create_topic(requests, options.partitions)
    kafka.create_topic(replies, options.partitions)
    context = multiprocessing.get_context("spawn")
    ready, stop = context.Event(), context.Event()
    arguments = (mode, kafka.bootstrap_servers, requests, replies, ready, stop)
    process = context.Process(target=serve, args=arguments)
    process.start()
    try:
        if not ready.wait(60):
            raise SystemExit("the front did not start")
        servers = kafka.bootstrap_servers
        asyncio.run(measure(servers, requests, replies, options.rate, int(options.rate)))  # warm
        kept, latencies = asyncio.run(
            measure(servers, requests, replies, options.rate, int(options.rate * options.seconds))
        )
        most, _ = asyncio.run(measure(servers, requests, replies, float("inf"), 10_000))
        time.sleep(2.0)
        left = asyncio.run(lag(servers, requests))
    finally:
        stop.set()
        process.join(20)
        with contextlib.suppress(ProcessLookupError):
            process.kill()
    cuts = statistics.quantiles(latencies, n=100)
    return {
        "replies_per_s": kept, "p50_ms": cuts[49] * 1e3, "p99_ms": cuts[98] * 1e3, "most_per_s": most, "lag": left,
    }  # fmt: skip


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=500.0, help="replies per second")
    parser.add_argument("--seconds", type=float, default=15.0, help="how long at that rate, each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--partitions", type=int, default=12)
    options = parser.parse_args()
    figures: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    with KafkaCluster() as kafka:
        for number in range(options.rounds + 1):
            for mode in MODES:
                measured = run(mode, kafka, options)
                if number > 0:
                    figures[mode].append(measured)
                shown = {name: round(value, 1) for name, value in measured.items()}
                print(mode if number > 0 else f"{mode} (not counted)", shown, flush=True)
    medians = {
        mode: {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
        for mode, rounds in figures.items()
    }
    document = {"benchmark": "delivery", "machine": describe_machine(), "options": vars(options), "medians": medians}
    print(json.dumps(document))


if __name__ == "__main__":
    main()
