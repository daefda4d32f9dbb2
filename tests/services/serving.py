"""One running worker with its topics, and clients for it."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from loramux_producer import Client
from services.kafka import KafkaCluster
from services.worker import WorkerProcess, worker_topics
from tiny_models import TinyModel


@dataclass(frozen=True)
class Serving:
    """What a test needs to talk to a worker."""

    kafka: KafkaCluster
    worker: WorkerProcess
    model: TinyModel
    topics: dict[str, str]

    def client(self, **options: Any) -> Client:
        """A client on the worker's topics, not started."""
        return client_of(self.kafka, self.topics, **options)


def client_of(kafka: KafkaCluster, topics: dict[str, str], **options: Any) -> Client:
    """A client on the topics of `worker_topics`, not started."""
    names = ("requests_topic", "replies_topic", "stream_topic", "control_topic")
    return Client(kafka.bootstrap_servers, **{name: topics[name] for name in names}, **{"timeout": 120, **options})


def new_topics(kafka: KafkaCluster, partitions: int = 4) -> dict[str, str]:
    """Topics that no other test has, by flag."""

    def create(name: str, count: int) -> str:
        unique = f"{name}-{uuid.uuid4().hex[:8]}"
        kafka.create_topic(unique, count)
        return unique

    return worker_topics(create, partitions)


@contextlib.contextmanager
def serving(kafka: KafkaCluster, model: TinyModel, **flags: object) -> Iterator[Serving]:
    """A worker on topics of its own."""
    topics = new_topics(kafka)
    with worker_of(kafka, model, topics, **flags) as worker:
        yield Serving(kafka, worker, model, topics)


def worker_of(kafka: KafkaCluster, model: TinyModel, topics: dict[str, str], **flags: object) -> WorkerProcess:
    """A worker of the topics' group, not started."""
    uri = f"file://{model.adapters}/{{adapter_id}}"
    settings = {"adapter_uri": uri, "group_id": topics["requests_topic"], "dtype": "float32", **topics, **flags}
    return WorkerProcess(kafka.bootstrap_servers, model.path, **settings)
