"""The control topic on a real Kafka: read as a whole, from some time ago on, whatever lies in it and happens to it."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from aiokafka import AIOKafkaProducer
from confluent_kafka.admin import NewPartitions

from loramux_schemas import Cancellation, KafkaConnection
from loramux_worker.errors import ConfigurationError
from loramux_worker.kafka import control as control_module
from loramux_worker.kafka.control import ControlReader
from services.kafka import KafkaCluster
from services.process import free_port

pytestmark = pytest.mark.kafka

TOPIC = "lora.control"
SECONDS = 60.0
MEMORY = 600.0


class Reading:
    """A reader and what it has told."""

    def __init__(self, kafka: KafkaCluster) -> None:
        self.told: Counter[str] = Counter()
        self.times: list[float] = []
        self._news = asyncio.Event()
        connection = KafkaConnection(bootstrap_servers=kafka.bootstrap_servers)
        self.reader = ControlReader(connection, TOPIC, memory=MEMORY, on_cancel=self._take)

    def _take(self, request_id: str, at: float) -> None:
        self.told[request_id] += 1
        self.times.append(at)
        self._news.set()

    async def wait_told(self, request_id: str) -> None:
        async with asyncio.timeout(SECONDS):
            while request_id not in self.told:
                self._news.clear()
                await self._news.wait()


@pytest.fixture(scope="module")
def own_kafka() -> Iterator[KafkaCluster]:
    with KafkaCluster() as kafka:
        kafka.create_topic(TOPIC, 2)
        yield kafka


async def test_what_it_reads(own_kafka: KafkaCluster, kcat: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_module, "RETRY_SECONDS", 0.1)
    now = time.time()
    before = asyncio.all_tasks()
    async with AIOKafkaProducer(bootstrap_servers=own_kafka.bootstrap_servers) as producer:

        async def say(value: bytes | None, partition: int = 0, age: float = 0.0) -> None:
            timestamp = int((now - age) * 1000)
            await producer.send_and_wait(TOPIC, value, key=b"k", partition=partition, timestamp_ms=timestamp)

        async def cancel(request_id: str, partition: int = 0, age: float = 0.0) -> None:
            await say(Cancellation.of(request_id).to_json(), partition, age)

        await cancel("long ago", age=MEMORY + 60)
        await cancel("a while ago", age=MEMORY / 2)
        for value in (b"junk", b"\xff", b"[1]", b'{"type":"stop","request_id":"x"}', None):
            await say(value)
        await cancel("behind junk")
        say_with_an_unreadable_header(own_kafka, kcat)
        await cancel("behind an unreadable header")
        await say_in_transactions(own_kafka)  # a transaction's marker is the last thing in the partition

        reading = Reading(own_kafka)
        started = time.monotonic()
        await reading.reader.start()
        try:
            expected = {"a while ago", "behind junk", "behind an unreadable header", "in an unreadable header"}
            assert set(reading.told) == expected | {"committed"}, "everything that was there when it started"
            assert time.monotonic() - started < control_module.CATCH_UP_SECONDS / 2
            assert min(reading.times) == pytest.approx(now - MEMORY / 2, abs=0.01)
            await cancel("now", partition=1)
            await reading.wait_told("now")

            await asyncio.to_thread(own_kafka.kill_broker, 0)
            await asyncio.to_thread(own_kafka.start_broker, 0)
            await cancel("after an outage")
            await reading.wait_told("after an outage")

            # aiokafka itself says nothing when its fetching ends: its consumer just never returns a record again.
            reading.reader._consumer._fetcher._fetch_task.cancel()
            await cancel("after its client died", partition=1)
            await reading.wait_told("after its client died")
        finally:
            await reading.reader.close()
    assert set(reading.told.values()) == {1}
    assert set(reading.told) & {"long ago", "aborted"} == set()
    assert asyncio.all_tasks() == before


async def test_a_partition_that_is_added_is_read(own_kafka: KafkaCluster) -> None:
    reading = Reading(own_kafka)
    reading.reader._options["metadata_max_age_ms"] = 200
    await reading.reader.start()
    try:
        admin = own_kafka.admin()
        growing = admin.create_partitions([NewPartitions(TOPIC, 3)])
        await asyncio.to_thread(growing[TOPIC].result, SECONDS)
        async with AIOKafkaProducer(bootstrap_servers=own_kafka.bootstrap_servers) as producer:
            while len(await producer.partitions_for(TOPIC)) < 3:
                await producer.client.force_metadata_update()
            await producer.send_and_wait(TOPIC, Cancellation.of("on the new one").to_json(), partition=2)
        await reading.wait_told("on the new one")
    finally:
        await reading.reader.close()


async def test_nobody_answers() -> None:
    connection = KafkaConnection(bootstrap_servers=f"127.0.0.1:{free_port()}")
    reader = ControlReader(connection, TOPIC, memory=1, on_cancel=lambda *_: None, startup_timeout=0.5)
    with pytest.raises(ConfigurationError, match="--bootstrap-servers: no Kafka broker answered"):
        await reader.start()
    await reader.close()


def say_with_an_unreadable_header(kafka: KafkaCluster, kcat: str) -> None:
    """A header's name that is not UTF-8, over which aiokafka's parser falls."""
    value = Cancellation.of("in an unreadable header").to_json() + b"\n"
    command = [kcat, "-q", "-b", kafka.bootstrap_servers, "-t", TOPIC, "-p", "0", "-P", "-H", b"\xff\xfe=\xff"]
    subprocess.run(command, input=value, check=True, timeout=SECONDS)


async def say_in_transactions(kafka: KafkaCluster) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, transactional_id="control-test")
    await producer.start()
    try:
        async with producer.transaction():
            await producer.send_and_wait(TOPIC, Cancellation.of("committed").to_json(), partition=1)
        await producer.begin_transaction()
        await producer.send_and_wait(TOPIC, Cancellation.of("aborted").to_json(), partition=1)
        await producer.abort_transaction()
    finally:
        await producer.stop()
