"""The embedded broker serves aiokafka clients and kcat as the demo needs it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.structs import OffsetAndMetadata

from loramux_worker.errors import ConfigurationError
from loramux_worker.kafka.embedded import EmbeddedBroker
from services.process import ServerProcess, answers, free_port

SECONDS = 30.0
TOPIC = "lora.requests"


@asynccontextmanager
async def running(client: Any) -> AsyncIterator[Any]:
    await client.start()
    try:
        yield client
    finally:
        await client.stop()


def group_consumer(broker: EmbeddedBroker) -> AIOKafkaConsumer:
    return AIOKafkaConsumer(
        TOPIC,
        bootstrap_servers=broker.bootstrap_servers,
        group_id="loramux",
        auto_offset_reset="earliest",
        enable_auto_commit=False,
        isolation_level="read_committed",
    )


async def take(consumer: AIOKafkaConsumer, count: int) -> list[Any]:
    messages: list[Any] = []
    async with asyncio.timeout(SECONDS):
        while len(messages) < count:
            for batch in (await consumer.getmany(timeout_ms=200)).values():
                messages += batch
    return messages


async def test_group_reads_what_was_produced_and_goes_on_after_its_commit() -> None:
    partitions = [TopicPartition(TOPIC, number) for number in range(4)]
    headers = [("correlation_id", b"\0\xff")]
    with EmbeddedBroker() as broker:
        async with running(AIOKafkaProducer(bootstrap_servers=broker.bootstrap_servers, acks="all")) as producer:
            assert await producer.partitions_for(TOPIC) == {0, 1, 2, 3}  # nobody created it
            for i in range(40):
                await producer.send_and_wait(TOPIC, b"%d" % i, partition=i % 4, headers=[("correlation_id", b"\0\xff")])
            async with running(group_consumer(broker)) as consumer:
                messages = await take(consumer, 40)
                assert sorted(int(m.value) for m in messages) == list(range(40))
                assert messages[0].headers == tuple(headers)
                await consumer.commit({p: OffsetAndMetadata(10, "m" * 4096) for p in partitions})
            await producer.send_and_wait(TOPIC, b"later", partition=2)
            async with running(group_consumer(broker)) as consumer:
                assert [m.value for m in await take(consumer, 1)] == [b"later"]
                assert [await consumer.committed(p) for p in partitions] == [10, 10, 10, 10]


async def test_reader_without_a_group_sees_every_partition() -> None:
    with EmbeddedBroker() as broker:
        async with (
            running(AIOKafkaProducer(bootstrap_servers=broker.bootstrap_servers)) as producer,
            running(AIOKafkaConsumer("lora.replies", bootstrap_servers=broker.bootstrap_servers)) as consumer,
        ):
            await consumer.seek_to_end()
            for i in range(8):
                await producer.send_and_wait("lora.replies", b"%d" % i, partition=i % 4)
            assert {int(m.value) for m in await take(consumer, 8)} == set(range(8))


async def test_partition_keeps_its_last_five_mebibytes() -> None:
    with EmbeddedBroker() as broker:
        async with running(AIOKafkaProducer(bootstrap_servers=broker.bootstrap_servers)) as producer:
            for _ in range(12):
                await producer.send_and_wait(TOPIC, bytes(900_000), partition=0)
        async with running(AIOKafkaConsumer(bootstrap_servers=broker.bootstrap_servers)) as consumer:
            place = TopicPartition(TOPIC, 0)
            first, end = await consumer.beginning_offsets([place]), await consumer.end_offsets([place])
    assert end[place] == 12
    assert end[place] - first[place] == 5 * 2**20 // 900_000


async def test_broker_on_a_chosen_port_serves_two_clients_and_frees_it() -> None:
    port = free_port()
    with EmbeddedBroker(port) as broker:
        assert broker.bootstrap_servers == f"127.0.0.1:{port}"
        async with (
            running(AIOKafkaProducer(bootstrap_servers=broker.bootstrap_servers)) as producer,
            running(group_consumer(broker)) as consumer,
        ):
            await producer.send_and_wait(TOPIC, b"hello")
            assert [m.value for m in await take(consumer, 1)] == [b"hello"]
        with (
            pytest.raises(ConfigurationError, match=f"--port {port}: .*in use.*; choose another"),
            EmbeddedBroker(port),
        ):
            pass
    assert not answers(port)
    with EmbeddedBroker(port):
        assert answers(port)


def test_kcat_talks_to_it(kcat: str) -> None:
    with EmbeddedBroker(free_port()) as broker:
        common = [kcat, "-q", "-b", broker.bootstrap_servers, "-t", TOPIC]
        subprocess.run([*common, "-P", "-p", "1"], input=b"by hand\n", check=True, timeout=SECONDS)
        command = [*common, "-C", "-p", "1", "-c", "1", "-o", "beginning"]
        read_back = subprocess.run(command, capture_output=True, check=True, timeout=SECONDS)
    assert read_back.stdout == b"by hand\n"


def test_missing_wheel_is_one_line_that_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "confluent_kafka", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'loramux\[embedded\]'"), EmbeddedBroker():
        pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_broker_command_runs_until_it_is_asked_to_end(tmp_path: Path, number: signal.Signals) -> None:
    port = free_port()
    log = tmp_path / "broker.log"
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "PYTHONUNBUFFERED": "1"}
    command = [
        sys.executable,
        "-c",
        "from loramux_worker.cli import main; main()",
        "broker",
        "--port",
        str(port),
    ]
    with ServerProcess(command, log_path=log, environment=paths) as server:
        server.wait_until(lambda: "Ctrl-C" in log.read_text(), seconds=SECONDS)
        assert answers(port)
        server.signal(number)
        assert server.wait(SECONDS) == 0
    assert log.read_text() == (f"Kafka broker on 127.0.0.1:{port}, for development only. Ctrl-C ends it.\n")
