"""Starting and closing, with a broker and without."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from intake_rig import Worker, connection, offsets, produce, publishing, read_all, reply, working
from loramux_schemas import KafkaConnection
from loramux_worker.errors import ConfigurationError
from loramux_worker.kafka import consumer, intake, producer
from loramux_worker.kafka.commits import PlainCommits
from loramux_worker.kafka.delivery import AtLeastOnce
from loramux_worker.kafka.embedded import EmbeddedBroker
from loramux_worker.kafka.intake import Intake
from loramux_worker.kafka.producer import PublisherClosed
from loramux_worker.kafka.publisher import Publisher
from loramux_worker.kafka.records import OutgoingRecord
from loramux_worker.kafka.topics import ensure_topics
from services.kafka import KafkaCluster
from services.process import free_port

pytestmark = pytest.mark.kafka

SECONDS = 30.0


async def test_missing_topics_are_created_or_named(kafka: KafkaCluster, kafka_topics: Callable[..., str]) -> None:
    there = kafka_topics("there")
    missing = f"{there}-missing"
    topics = {"--requests-topic": there, "--replies-topic": missing}
    options: dict[str, Any] = {"startup_timeout": 10.0, "partitions": 5}
    with pytest.raises(ConfigurationError, match=f"--replies-topic: .*'{missing}'.*--create-topics"):
        await ensure_topics(connection(kafka), topics, create=False, **options)
    with pytest.raises(ConfigurationError, match=f"--requests-topic: .*'{missing}'.*--create-topics"):
        await Worker(kafka, missing).intake.start()
    with pytest.raises(ConfigurationError, match="--stream-topic: cannot create topic 'not a name'"):
        await ensure_topics(connection(kafka), {"--stream-topic": "not a name"}, create=True, **options)
    try:
        await ensure_topics(connection(kafka), topics, create=True, **options)
        await ensure_topics(connection(kafka), topics, create=False, **options)
        assert len(kafka.admin().list_topics(missing, timeout=10.0).topics[missing].partitions) == 5
    finally:
        kafka.delete_topic(missing)


async def test_no_broker_is_an_error_that_names_the_setting() -> None:
    nobody = KafkaConnection(bootstrap_servers=f"127.0.0.1:{free_port()}")
    message = "--bootstrap-servers: no Kafka broker answered at 127.0.0.1:.* within 0.7 s"
    commits = PlainCommits(nobody, topic="t", group_id="g")
    with pytest.raises(ConfigurationError, match=message):
        await Intake(nobody, topic="t", group_id="g", commits=commits, on_lost=print, startup_timeout=0.7).start()
    with pytest.raises(ConfigurationError, match=message):
        await Publisher(nobody, startup_timeout=0.7).start()
    with pytest.raises(ConfigurationError, match=message):
        await ensure_topics(nobody, {"--requests-topic": "t"}, create=True, startup_timeout=0.7)


async def test_closing_while_the_broker_is_away_comes_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "WATCH_SECONDS", 0.5)
    for module in (consumer, producer):
        monkeypatch.setattr(module, "STOP_SECONDS", 1.0)
    with EmbeddedBroker() as broker:
        worker, publisher = Worker(broker, "requests"), Publisher(connection(broker))
        topics = {"--requests-topic": "requests", "--replies-topic": "replies"}
        await ensure_topics(connection(broker), topics, create=True, startup_timeout=10.0)
        await worker.intake.start()
        await publisher.start()
        await worker.until_assigned()
        await publisher.send([OutgoingRecord("replies", b"key", b"first")])
    sending = asyncio.create_task(publisher.send([OutgoingRecord("replies", b"key", b"second")]))
    await worker.until(lambda: worker.intake.trouble is not None)
    async with asyncio.timeout(SECONDS):
        await worker.intake.close()
        await publisher.close()
        with pytest.raises(PublisherClosed):
            await sending


async def test_the_embedded_broker_serves_a_worker() -> None:
    with EmbeddedBroker() as broker:
        quick = {"session_timeout": 3.0}  # how long it keeps a place for a member that has left
        reached = KafkaConnection(bootstrap_servers=broker.bootstrap_servers)
        topics = {"--requests-topic": "requests", "--replies-topic": "replies"}
        await ensure_topics(reached, topics, create=True, startup_timeout=10.0)
        async with working(broker, "requests", **quick) as worker, publishing(broker, "replies") as publisher:
            assert not publisher.fits(OutgoingRecord("replies", None, b"x" * 1_000_000))
            await produce(broker, "requests", 5, 2)
            delivery = AtLeastOnce(publisher, worker.intake)
            records = await worker.take(5)
            for record in records[1:]:
                await delivery.complete(record, [reply(record)])
        async with working(broker, "requests", **quick) as worker:
            assert offsets(await worker.take(1)) == [0]
            await worker.take_nothing()
        assert len(await read_all(broker, "replies", 4)) == 4
