"""One worker's Kafka side for tests: what is read and answered, without text or engines."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from contextlib import asynccontextmanager
from typing import Any

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from loramux_schemas import KafkaConnection
from loramux_worker.kafka.commits import Commits, PlainCommits
from loramux_worker.kafka.embedded import EmbeddedBroker
from loramux_worker.kafka.intake import Intake
from loramux_worker.kafka.publisher import Publisher
from loramux_worker.kafka.records import OutgoingRecord, Record
from services.kafka import KafkaCluster

SECONDS = 30.0


class Worker:
    """An intake and what it told us; without `commits` it commits as a consumer does."""

    def __init__(
        self, kafka: KafkaCluster | EmbeddedBroker, topic: str, commits: Commits | None = None, **options: Any
    ) -> None:
        self.lost: set[tuple[int, int]] = set()
        options = {"group_id": topic, "commit_interval": 0.1, **options}
        if commits is None:
            commits = PlainCommits(connection(kafka), topic=topic, group_id=options["group_id"])
        self.intake = Intake(connection(kafka), topic=topic, commits=commits, on_lost=self.lose, **options)

    def lose(self, lost: Collection[tuple[int, int]]) -> None:
        """These (partition, epoch) went to another worker."""
        self.lost.update(lost)

    async def take(self, count: int) -> list[Record]:
        """Exactly `count` records."""
        records: list[Record] = []
        async with asyncio.timeout(SECONDS):
            while len(records) < count:
                records += await self.intake.take(count - len(records), 1.0)
        return records

    async def take_nothing(self) -> None:
        assert await self.intake.take(100, 0.5) == []

    async def until(self, condition: Callable[[], bool]) -> None:
        """Polls, without wanting a record, until `condition` holds."""
        async with asyncio.timeout(SECONDS):
            while not condition():
                assert await self.intake.take(1, 0.05) == []

    async def until_assigned(self) -> None:
        """Waits for any partition, without reading."""
        async with asyncio.timeout(SECONDS):
            while not self.intake.assigned:
                assert await self.intake.take(0, 0.05) == []

    async def assigned(self, partitions: Iterable[int]) -> None:
        wanted = frozenset(partitions)
        async with asyncio.timeout(SECONDS):
            while self.intake.assigned != wanted:
                assert await self.intake.take(0, 0.05) == []


@asynccontextmanager
async def working(kafka: KafkaCluster | EmbeddedBroker, topic: str, **options: Any) -> AsyncIterator[Worker]:
    worker = Worker(kafka, topic, **options)
    await worker.intake.start()
    try:
        yield worker
    finally:
        await worker.intake.close()


@asynccontextmanager
async def publishing(kafka: KafkaCluster | EmbeddedBroker, *topics: str) -> AsyncIterator[Publisher]:
    publisher = Publisher(connection(kafka), topics=topics)
    await publisher.start()
    try:
        yield publisher
    finally:
        await publisher.close()


def connection(kafka: KafkaCluster | EmbeddedBroker) -> KafkaConnection:
    return KafkaConnection(bootstrap_servers=kafka.bootstrap_servers)


async def produce(
    kafka: KafkaCluster | EmbeddedBroker,
    topic: str,
    count: int,
    partition: int = 0,
    *,
    padding: int = 0,
    **options: Any,
) -> None:
    """Values b"0", b"1", … to one partition, each at the offset of its value in a fresh topic."""
    async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, **options) as producer:
        if "transactional_id" in options:
            async with producer.transaction():
                for i in range(count):
                    await producer.send(topic, b"%-*d" % (padding, i), partition=partition)
        else:
            for i in range(count):
                await producer.send(topic, b"%-*d" % (padding, i), partition=partition)


async def read_all(kafka: KafkaCluster | EmbeddedBroker, topic: str, count: int) -> list[Any]:
    """The first `count` committed records of a topic, in the order of each partition."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=kafka.bootstrap_servers,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        enable_auto_commit=False,
    )
    async with consumer, asyncio.timeout(SECONDS):
        partitions = (await consumer._client.fetch_all_metadata()).partitions_for_topic(topic)
        consumer.assign([TopicPartition(topic, number) for number in partitions])
        records: list[Any] = []
        while len(records) < count:
            for batch in (await consumer.getmany(timeout_ms=200)).values():
                records += batch
        return records


def offsets(records: Iterable[Record]) -> list[int]:
    return [record.offset for record in records]


def reply(record: Record) -> OutgoingRecord:
    return OutgoingRecord(
        "replies", b"%d-%d" % (record.partition, record.offset), record.value, (("correlation_id", b"\x00"),)
    )
