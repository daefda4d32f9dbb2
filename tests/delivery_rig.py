"""Workers' Kafka sides that answer exactly once, for tests, and what readers see of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Collection, Iterable
from contextlib import AsyncExitStack, asynccontextmanager

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer

from intake_rig import Worker, connection
from loramux_worker.kafka.exactly_once import ExactlyOnce
from loramux_worker.kafka.publisher import Publisher
from loramux_worker.kafka.records import OutgoingRecord, Record
from services.kafka import KafkaCluster

SECONDS = 30.0


class Member(Worker):
    """One worker's Kafka side; it answers what it is told to."""

    def __init__(self, kafka: KafkaCluster, requests: str, replies: str, *, heartbeat_seconds: float = 1.0) -> None:
        self.replies = replies
        self.publisher = Publisher(connection(kafka), topics=[replies])
        self.delivery = ExactlyOnce(connection(kafka), topic=requests, group_id=requests, publisher=self.publisher)
        self.answering: dict[asyncio.Task[None], Record] = {}
        super().__init__(kafka, requests, self.delivery, session_timeout=6.0 * heartbeat_seconds)
        self.intake._options["heartbeat_interval_ms"] = int(heartbeat_seconds * 1000)

    def lose(self, lost: Collection[tuple[int, int]]) -> None:
        super().lose(lost)
        for task, record in self.answering.items():
            if (record.partition, record.epoch) in lost:
                task.cancel()

    def answer(self, record: Record, value: bytes | None = None, topic: str | None = None) -> asyncio.Task[None]:
        """Begins to answer with what was asked."""
        reply = OutgoingRecord(topic or self.replies, record.value, value or record.value)
        task = asyncio.create_task(self.delivery.complete(record, [reply]))
        self.answering[task] = record
        return task

    async def until_idle(self) -> None:
        """Until lag is 0; what was answered before is still to be passed."""
        await self.until(lambda: bool(self.intake.assigned) and not any(self.intake.lag().values()))


@asynccontextmanager
async def joined(member: Member) -> AsyncIterator[Member]:
    """The member from joining to leaving."""
    async with AsyncExitStack() as stack:
        await member.publisher.start()
        stack.push_async_callback(member.publisher.close)
        await member.intake.start()
        stack.push_async_callback(member.intake.close)
        yield member


async def ask(kafka: KafkaCluster, topic: str, values: Iterable[int], partition: int | None = None) -> None:
    async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers) as producer:
        for value in values:
            await producer.send(topic, str(value).encode(), partition=partition)
        await producer.flush()


async def answers(kafka: KafkaCluster, topic: str) -> Counter[int]:
    """What a read_committed reader finds, by value."""
    async with AIOKafkaConsumer(
        topic, bootstrap_servers=kafka.bootstrap_servers, isolation_level="read_committed", auto_offset_reset="earliest"
    ) as consumer:
        names = consumer.assignment()
        ends = await consumer.end_offsets(names)
        found: Counter[int] = Counter()
        async with asyncio.timeout(SECONDS):
            while any([await consumer.position(name) < ends[name] for name in names]):
                for messages in (await consumer.getmany(timeout_ms=200)).values():
                    found.update(int(message.value) for message in messages)
        return found


async def each_answered_once(kafka: KafkaCluster, topic: str, values: Iterable[int]) -> None:
    """A commit is seen a moment after it is acknowledged: looks until just these values are there, once each."""
    async with asyncio.timeout(SECONDS):
        while await answers(kafka, topic) != Counter(values):  # noqa: ASYNC110 - the broker tells nobody
            await asyncio.sleep(0.05)
