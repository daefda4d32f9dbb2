"""Fixtures of every test: the servers of tests/services, and what to say when one is not installed.

def test_it(kafka, kafka_topics):
    topic = kafka_topics("requests", partitions=4)      # a new name each time, deleted after the test
    … bootstrap_servers=kafka.bootstrap_servers …
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import uuid
from collections.abc import Generator, Iterator, Mapping
from typing import NoReturn

import pytest

# The models of the tests are tiny: threads that wait for one another at every op cost more than they bring, most of
# all on a busy machine. Workers that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Triton reads it when it is imported, and transformers imports it: without a GPU the kernels run in its interpreter.
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A run in the background of a shell ignores Ctrl-C, and so would the commands that tests interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from services.install import ServiceMissing, kafka_libs, versitygw
from services.kafka import KafkaCluster
from services.prometheus import program as prometheus_program
from services.s3 import S3Server


def missing(reason: str) -> NoReturn:
    """A laptop may lack a server: the test is skipped. CI may not: the test fails."""
    if os.environ.get("CI") == "true":
        raise pytest.fail.Exception(reason, pytrace=False) from None
    raise pytest.skip.Exception(reason) from None


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Inside it a ServiceMissing skips or fails the test."""
    try:
        yield
    except ServiceMissing as reason:
        missing(str(reason))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests marked `gpu` are for machines that have one: elsewhere they are not there at all."""
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not has_gpu():
        config.hook.pytest_deselected(items=marked)
        items[:] = [item for item in items if item not in marked]


def has_gpu() -> bool:
    """Whether torch sees a GPU here."""
    import torch

    return torch.cuda.is_available()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Tests marked `kafka`, `s3` or `prometheus` may start servers of their own: told before, not in the middle."""
    with installed():
        if item.get_closest_marker("kafka"):
            kafka_libs()
        if item.get_closest_marker("s3"):
            versitygw()
        if item.get_closest_marker("prometheus"):
            prometheus_program("prometheus")
            prometheus_program("promtool")


@pytest.fixture(scope="session")
def kafka() -> Iterator[KafkaCluster]:
    """One Apache Kafka broker, shared by the session: a test that stops brokers makes its own."""
    with installed(), KafkaCluster() as cluster:
        yield cluster


class KafkaTopics:
    """Creates topics under names that no other test has."""

    def __init__(self, cluster: KafkaCluster) -> None:
        self._cluster = cluster
        self._created: list[str] = []

    def __call__(self, name: str = "topic", partitions: int = 1, config: Mapping[str, str] | None = None) -> str:
        """Creates `name-xxxxxxxx` and returns that name."""
        unique = f"{name}-{uuid.uuid4().hex[:8]}"
        self._cluster.create_topic(unique, partitions, config=config)
        self._created.append(unique)
        return unique

    def delete_all(self) -> None:
        """Deletes what was created, so that the shared broker stays small."""
        for name in self._created:
            self._cluster.delete_topic(name)
        self._created.clear()


@pytest.fixture
def kafka_topics(kafka: KafkaCluster) -> Iterator[KafkaTopics]:
    """`kafka_topics(name, partitions=1, config=None) -> str`: a new topic on the shared broker."""
    topics = KafkaTopics(kafka)
    yield topics
    topics.delete_all()


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """An S3 server, shared by the session: use a bucket of your own (`s3_bucket`)."""
    with installed(), S3Server() as server:
        yield server


@pytest.fixture
def s3_bucket(s3: S3Server) -> str:
    """The name of a new, empty bucket on the shared S3 server."""
    return s3.create_bucket(f"bucket-{uuid.uuid4().hex[:8]}")


@pytest.fixture(scope="session")
def kcat() -> str:
    """The path of the `kcat` binary."""
    path = shutil.which("kcat")
    if path is None:
        missing("no `kcat` on PATH (Debian: apt-get install kcat)")
    return path


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Adds the end of the servers' logs to the report of a test that used them and failed."""
    report = yield
    if report.failed:
        for value in getattr(item, "funcargs", {}).values():
            if isinstance(value, KafkaCluster | S3Server):
                report.sections.append((f"logs of {type(value).__name__}", value.recent_logs()))
    return report
