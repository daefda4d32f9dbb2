"""A rolling upgrade under load, then scale to zero and back, on a real Apache Kafka with the demo model.

    PYTHONPATH=tests python tests/benchmarks/bench_rollout.py [--rate 200] [--seconds 15] [--workers 3]

Workers are replaced one after the other as our Kubernetes Deployment does it: one gets SIGTERM, and when it has ended a
new one starts; the next one's turn comes when that is ready. Then all end, a request waits, and a worker starts for it.
Reported: lost and repeated replies, latencies before and during the upgrade, lag of the idle group, and how the time to
the first reply is made up. The last line of the output is a JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import threading
import time
import uuid
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
from confluent_kafka import Consumer, Producer, TopicPartition

from benchmarks.machine import describe_machine
from chaos.reading import Watch, read_all
from services.kafka import KafkaCluster
from services.worker import WorkerProcess, worker_topics

DEMO = Path(__file__).resolve().parents[2] / "deploy" / "demo"
NEW_TOKENS = 4
PIECES = {
    "processes": "engine_starting",  # the interpreter and its imports, in front and engine
    "model load": "model_loaded",
    "model check and graphs": "engine_ready",  # graphs on a GPU alone
    "group": "partitions_assigned",
    "adapter": "adapter_downloaded",
}


class Load:
    """Asks at a steady rate from a thread of its own; `sent` says when each request was handed to the producer."""

    def __init__(self, servers: str, topic: str, rate: float, adapters: list[str]) -> None:
        self.sent: dict[str, float] = {}
        self._topic = topic
        self._period = 1.0 / rate
        self._adapters = adapters
        self._producer = Producer({"bootstrap.servers": servers, "enable.idempotence": True, "linger.ms": 1})
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._run, name="load", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ask no more; returns when Kafka has everything."""
        self._ending.set()
        self._thread.join()
        self._producer.flush()

    def ask(self) -> str:
        """One request more."""
        request_id, adapter = str(uuid.uuid4()), self._adapters[len(self.sent) % len(self._adapters)]
        parameters = {"max_new_tokens": NEW_TOKENS, "ignore_eos": True}
        request = {
            "request_id": request_id,
            "adapter_id": adapter,
            "prompt": "Where is my order?",
            "parameters": parameters,
        }
        self.sent[request_id] = time.monotonic()
        self._producer.produce(self._topic, orjson.dumps(request), adapter)
        self._producer.poll(0)
        return request_id

    def _run(self) -> None:
        due = time.monotonic()
        while not self._ending.wait(max(0.0, due - time.monotonic())):
            self.ask()
            due += self._period


def latencies(load: Load, watch: Watch, begin: float, end: float) -> dict[str, float]:
    """Of the requests that were asked between two moments, in milliseconds."""
    took = [(watch.seen[i].at - at) * 1e3 for i, at in load.sent.items() if begin <= at < end and i in watch.seen]
    cuts = statistics.quantiles(took, n=100)
    return {
        "requests": len(took),
        "p50_ms": round(cuts[49], 1),
        "p99_ms": round(cuts[98], 1),
        "max_ms": round(max(took), 1),
    }


def lag(servers: str, group: str, topic: str) -> int:
    """Offsets between what the group has committed and the ends of its topic."""
    consumer = Consumer({"bootstrap.servers": servers, "group.id": group, "enable.auto.commit": False})
    try:
        names = [TopicPartition(topic, number) for number in consumer.list_topics(topic).topics[topic].partitions]
        ends = [consumer.get_watermark_offsets(name)[1] for name in names]
        return sum(end - max(0, at.offset) for end, at in zip(ends, consumer.committed(names), strict=True))
    finally:
        consumer.close()


def wait_for(condition: Any, seconds: float, what: str) -> None:
    """Ends the program when it does not come about."""
    limit = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > limit:
            raise SystemExit(f"after {seconds:.0f} s: not {what}")
        time.sleep(0.02)


def first_reply(worker: WorkerProcess, began: float, watch: Watch, request_id: str) -> dict[str, float]:
    """Seconds from the start of a worker's process to the reply that it was started for, piece by piece."""
    wait_for(lambda: request_id in watch.seen, 120, "the waiting request answered")
    said = {}
    for line in worker.log_path.read_text().splitlines():
        event = json.loads(line)
        said.setdefault(event["event"], datetime.fromisoformat(event["timestamp"]).timestamp() - began)
    at = watch.seen[request_id].at - time.monotonic() + time.time() - began
    ends = {piece: said[event] for piece, event in PIECES.items()} | {"answer": at}
    pieces = dict(zip(ends, itertools.pairwise([0.0, *ends.values()]), strict=True))
    return {piece: round(end - start, 2) for piece, (start, end) in pieces.items()} | {"all": round(at, 2)}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, default=200.0, help="requests per second")
    parser.add_argument("--seconds", type=float, default=15.0, help="how long before and after the upgrade")
    parser.add_argument("--workers", type=int, default=3)
    options = parser.parse_args()
    store = DEMO / "adapters"
    adapters = sorted(str(path.parent.relative_to(store)) for path in store.rglob("adapter_config.json"))
    with KafkaCluster() as kafka:
        topics = worker_topics(lambda name, partitions: kafka.create_topic(name, partitions) or name, 12)
        flags = {
            **topics, "adapter_uri": f"file://{store}/{{adapter_id}}", "device": "cpu",
            "max_batch_sequences": 64, "session_timeout": "10s", "group_id": "rollout",
        }  # fmt: skip

        def start(wait: bool = True) -> WorkerProcess:
            # As a pod with a share of the machine: else PyTorch's threads are in each other's way.
            environment = {"OMP_NUM_THREADS": "1"}
            worker = WorkerProcess(kafka.bootstrap_servers, DEMO / "model", wait=wait, environment=environment, **flags)
            return worker.__enter__()

        running = [start() for _ in range(options.workers)]
        watch = Watch(kafka.bootstrap_servers, topics["replies_topic"])
        load = Load(kafka.bootstrap_servers, topics["requests_topic"], options.rate, adapters)
        time.sleep(5.0)
        steady = time.monotonic()
        time.sleep(options.seconds)
        upgrade, codes = time.monotonic(), []
        for old in list(running):
            codes.append(old.server.stop())
            running.remove(old)
            running.append(start())
            print(f"replaced a worker: exit code {codes[-1]}", flush=True)
        over = time.monotonic()
        time.sleep(options.seconds)
        end = time.monotonic()
        load.stop()
        wait_for(lambda: len(watch.seen) >= len(load.sent), 60, "everything answered")
        wait_for(lambda: lag(kafka.bootstrap_servers, "rollout", topics["requests_topic"]) == 0, 30, "lag 0")
        codes += [worker.server.stop() for worker in running]
        idle_lag = lag(kafka.bootstrap_servers, "rollout", topics["requests_topic"])
        waiting = load.ask()
        load.stop()
        began = time.time()
        worker = start(wait=False)
        back = first_reply(worker, began, watch, waiting)
        codes.append(worker.server.stop())
        counts = Counter(
            orjson.loads(m.value())["request_id"] for m in read_all(kafka.bootstrap_servers, topics["replies_topic"])
        )
        watch.close()
        document = {
            "benchmark": "rollout", "machine": describe_machine(), "options": vars(options),
            "lost": len(load.sent.keys() - counts.keys()), "repeated": sum(count - 1 for count in counts.values()),
            "exit_codes": codes, "upgrade_s": round(over - upgrade, 1), "lag_when_idle": idle_lag,
            "before": latencies(load, watch, steady, upgrade), "during": latencies(load, watch, upgrade, over),
            "after": latencies(load, watch, over, end), "from_zero_s": back,
        }  # fmt: skip
    for name in ("before", "during", "after"):
        print(f"{name:7}", document[name])
    print("lost", document["lost"], "repeated", document["repeated"], "from zero", back)
    print(json.dumps(document))


if __name__ == "__main__":
    main()
