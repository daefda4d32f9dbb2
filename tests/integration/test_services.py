"""The rigs themselves: Apache Kafka, the S3 server and kcat do what the other tests lean on."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import obstore
import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import ProducerFenced
from obstore.store import S3Store

from services.kafka import KafkaCluster
from services.process import answers
from services.s3 import S3Server

SECONDS = 60.0


@asynccontextmanager
async def producing(kafka: KafkaCluster, **options: object) -> AsyncIterator[AIOKafkaProducer]:
    producer = AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, acks="all", **options)
    await producer.start()
    try:
        yield producer
    finally:
        await producer.stop()


async def read(kafka: KafkaCluster, topic: str, count: int, isolation_level: str = "read_committed") -> list[bytes]:
    """The first `count` values of partition 0."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=kafka.bootstrap_servers,
        auto_offset_reset="earliest",
        isolation_level=isolation_level,
        enable_auto_commit=False,
    )
    await consumer.start()
    try:
        consumer.assign([TopicPartition(topic, 0)])
        values: list[bytes] = []
        async with asyncio.timeout(SECONDS):
            while len(values) < count:
                for messages in (await consumer.getmany(timeout_ms=500)).values():
                    values += [message.value for message in messages]
        return values
    finally:
        await consumer.stop()


@pytest.mark.kafka
async def test_group_consumer_reads_what_was_produced(kafka: KafkaCluster, kafka_topics: Callable[..., str]) -> None:
    topic = kafka_topics("requests", partitions=3)
    async with producing(kafka) as producer:
        for i in range(30):
            await producer.send_and_wait(topic, b"%d" % i, key=b"%d" % i, headers=[("n", b"%d" % i)])
    consumer = AIOKafkaConsumer(
        topic,
        bootstrap_servers=kafka.bootstrap_servers,
        group_id=topic,
        auto_offset_reset="earliest",
        enable_auto_commit=False,
    )
    await consumer.start()
    try:
        seen: list[Any] = []
        async with asyncio.timeout(SECONDS):
            while len(seen) < 30:
                for messages in (await consumer.getmany(timeout_ms=500)).values():
                    seen += messages
        assert sorted(int(m.value) for m in seen) == list(range(30))
        assert all(m.key == m.value == m.headers[0][1] for m in seen)
        assert {m.partition for m in seen} == {0, 1, 2}
        await consumer.commit()
        committed = [await consumer.committed(TopicPartition(topic, p)) for p in range(3)]
        assert sum(committed) == 30
    finally:
        await consumer.stop()


@pytest.mark.kafka
async def test_aborted_transaction_is_invisible_to_read_committed(
    kafka: KafkaCluster, kafka_topics: Callable[..., str]
) -> None:
    topic = kafka_topics("replies")
    async with producing(kafka, transactional_id=topic) as producer:
        await producer.begin_transaction()
        await (await producer.send(topic, b"aborted"))
        await producer.abort_transaction()
        async with producer.transaction():
            await (await producer.send(topic, b"committed"))
    assert await read(kafka, topic, 1) == [b"committed"]
    assert await read(kafka, topic, 2, "read_uncommitted") == [b"aborted", b"committed"]


@pytest.mark.kafka
async def test_second_producer_with_a_transactional_id_fences_the_first(
    kafka: KafkaCluster, kafka_topics: Callable[..., str]
) -> None:
    topic = kafka_topics("replies")
    async with producing(kafka, transactional_id=topic) as zombie:
        await zombie.begin_transaction()
        await (await zombie.send(topic, b"zombie"))
        async with producing(kafka, transactional_id=topic) as heir, heir.transaction():
            await (await heir.send(topic, b"heir"))
        with pytest.raises(ProducerFenced):
            await zombie.commit_transaction()
    assert await read(kafka, topic, 1) == [b"heir"]


@pytest.mark.kafka
def test_kcat_produces_and_consumes(kafka: KafkaCluster, kafka_topics: Callable[..., str], kcat: str) -> None:
    topic = kafka_topics("requests")
    common = [kcat, "-q", "-b", kafka.bootstrap_servers, "-t", topic]
    subprocess.run([*common, "-P", "-k", "acme/support"], input=b"by hand\n", check=True, timeout=SECONDS)
    read_back = [*common, "-C", "-c", "1", "-o", "beginning", "-f", "%k=%s"]
    assert subprocess.run(read_back, capture_output=True, check=True, timeout=SECONDS).stdout == b"acme/support=by hand"


@pytest.mark.kafka
async def test_broker_keeps_its_data_over_stop_and_kill() -> None:
    with KafkaCluster() as own:
        own.create_topic("kept")
        async with producing(own) as producer:
            await producer.send_and_wait("kept", b"first")
        own.stop_broker(0)
        assert not answers(own.ports[0])
        own.start_broker(0)
        async with producing(own) as producer:
            await producer.send_and_wait("kept", b"second")
        own.kill_broker(0)
        own.start_broker(0)
        assert await read(own, "kept", 2) == [b"first", b"second"]
        folder, port = own.folder, own.ports[0]
    assert not folder.exists()
    assert not answers(port)


@pytest.mark.kafka
async def test_three_brokers_survive_the_death_of_one() -> None:
    with KafkaCluster(brokers=3) as cluster:
        cluster.create_topic("spread", partitions=3)
        async with producing(cluster, request_timeout_ms=10_000) as producer:
            for partition in range(3):
                await producer.send_and_wait("spread", b"before", partition=partition)
            await asyncio.to_thread(cluster.kill_broker, 0)
            async with asyncio.timeout(SECONDS):
                for partition in range(3):
                    await producer.send_and_wait("spread", b"after", partition=partition)
        assert await read(cluster, "spread", 2) == [b"before", b"after"]
        cluster.start_broker(0)
        assert len(cluster.admin().list_topics(timeout=10.0).brokers) == 3


def test_server_dies_with_a_test_run_that_is_killed(tmp_path: Path) -> None:
    # The server holds the writing end of a pipe, so whoever reads it sees its end, whatever kind of end that is.
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    run = textwrap.dedent(
        """
        import os, signal, sys, pathlib
        from services.process import ServerProcess
        pipe = pathlib.Path(sys.argv[1])
        server = ServerProcess(["sh", "-c", 'echo up; exec sleep 600'], log_path=pipe)
        os.kill(os.getpid(), signal.SIGKILL)
        """
    )
    paths = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    killed = subprocess.run(
        [sys.executable, "-c", run, pipe], env={**os.environ, **paths}, check=False, timeout=SECONDS
    )
    assert killed.returncode == -signal.SIGKILL
    assert reader.communicate(timeout=SECONDS)[0] in (b"up\n", b"")


@pytest.mark.s3
async def test_s3_puts_gets_ranges_lists_and_heads(s3: S3Server, s3_bucket: str) -> None:
    store = s3.store(s3_bucket)
    content = os.urandom(300_000)
    await obstore.put_async(store, "adapters/acme/support/adapter_model.safetensors", content)
    await obstore.put_async(store, "adapters/acme/support/adapter_config.json", b"{}")
    await obstore.put_async(store, "adapters/other/adapter_config.json", b"{}")

    name = "adapters/acme/support/adapter_model.safetensors"
    assert bytes(await (await obstore.get_async(store, name)).bytes_async()) == content
    assert bytes(await obstore.get_range_async(store, name, start=1000, end=5000)) == content[1000:5000]
    parts = await obstore.get_ranges_async(store, name, starts=[0, 200_000], ends=[10, 300_000])
    assert [bytes(part) for part in parts] == [content[:10], content[200_000:]]
    assert (await obstore.head_async(store, name))["size"] == len(content)
    listed = [entry["path"] for entry in await obstore.list(store, prefix="adapters/acme").collect_async()]
    assert sorted(listed) == ["adapters/acme/support/adapter_config.json", name]
    with pytest.raises(FileNotFoundError):
        await obstore.get_async(store, "adapters/nobody/adapter_config.json")


@pytest.mark.s3
def test_s3_environment_is_enough_for_a_client(s3: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    S3Store(s3_bucket).put("hello", b"world")
    assert bytes(s3.store(s3_bucket).get("hello").bytes()) == b"world"


@pytest.mark.s3
def test_s3_refuses_a_wrong_key_and_keeps_buckets_over_a_restart() -> None:
    with S3Server() as own:
        bucket = own.create_bucket("kept")
        own.store(bucket).put("hello", b"world")
        own.stop()
        assert not answers(own.port)
        own.start()
        assert bytes(own.store(bucket).get("hello").bytes()) == b"world"
        own.secret_key = "wrong"
        with pytest.raises(Exception, match="SignatureDoesNotMatch"):
            own.store(bucket).get("hello")
