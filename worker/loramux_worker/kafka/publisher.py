"""Replies, dead letters and deltas into Kafka, acknowledged by every in-sync replica.

    publisher = Publisher(connection, topics=["lora.replies", "lora.stream"])
    await publisher.start()
    await publisher.send([reply])         # returns when the broker has it
    await publisher.send_soon(delta)      # returns at once; deltas stay in the order of these calls
    await publisher.close()

A record that the broker rejects costs the producer, so `fits` tells before whether it is too large.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from typing import Any, Final

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    KafkaError,
    KafkaTimeoutError,
    ProducerClosed,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)
from aiokafka.record.default_records import DefaultRecordBatchBuilder

from loramux_schemas import KafkaConnection
from loramux_worker.kafka.connecting import RETRY_SECONDS, TROUBLE, started_admin
from loramux_worker.kafka.outage import Outage, explain
from loramux_worker.kafka.producer import STOP_SECONDS, ReplaceableProducer
from loramux_worker.kafka.records import OutgoingRecord
from loramux_worker.kafka.sending import PERMANENT, RecordRefused, enqueue
from loramux_worker.kafka.topics import largest_messages

DEFAULT_LARGEST_MESSAGE: Final = 1_000_000  # bytes; Kafka's own default is 1,048,588
MAX_WAITING_DELTAS: Final = 10_000
SLOW_SECONDS: Final = 5.0
TOPIC_SECONDS: Final = 2.0

# The record never reached a batch, so that the producer's sequence numbers are as they were.
NOT_ENQUEUED: Final = (
    KafkaTimeoutError,
    ProducerClosed,
    TopicAuthorizationFailedError,
    UnknownTopicOrPartitionError,
)

log = structlog.get_logger(__name__)


class Publisher:
    """One idempotent producer, replaced when it fails.

    `topics` are those whose size limit is asked for at start; `compression` is Kafka's name of a codec.
    """

    def __init__(
        self,
        connection: KafkaConnection,
        *,
        topics: Iterable[str] = (),
        compression: str | None = None,
        startup_timeout: float = 30.0,
    ) -> None:
        self.lost_deltas = 0
        self._connection = connection
        self._topics = tuple(topics)
        self._startup_timeout = startup_timeout
        self._limits: dict[str, int] = {}
        self._outage = Outage("publishing")
        self._producer = ReplaceableProducer(
            connection, compression=compression, startup_timeout=startup_timeout, outage=self._outage
        )
        self._replacing: set[asyncio.Task[None]] = set()
        self._deltas: asyncio.Queue[OutgoingRecord] = asyncio.Queue(MAX_WAITING_DELTAS)
        self._streaming: asyncio.Task[None] | None = None

    @property
    def trouble(self) -> str | None:
        """Why replies wait; None while all is well."""
        return "Kafka is unavailable" if self._outage.active else None

    async def start(self) -> None:
        """Connects. Raises ConfigurationError when no broker answers within `startup_timeout` seconds."""
        admin = await started_admin(self._connection, timeout=self._startup_timeout)
        try:
            self._limits = await largest_messages(admin, self._topics)
        finally:
            await admin.close()
        await self._producer.start()
        self._streaming = asyncio.create_task(self._stream(), name="publish-deltas")

    def fits(self, record: OutgoingRecord) -> bool:
        """Whether the broker will take a record of this size; compression is not counted on."""
        size = DefaultRecordBatchBuilder.estimate_size_in_bytes(record.key, record.value, list(record.headers))
        return bool(size <= self._limits.get(record.topic, DEFAULT_LARGEST_MESSAGE))

    async def require_place(self, record: OutgoingRecord) -> None:
        """Returns when the record's topic, and the partition that it names, are known to be there.

        Raises RecordRefused when they are not, PublisherClosed when `close` came first.
        """
        while True:
            try:
                await self._require_place(self._producer.current, record)
                self._outage.over()
                return
            except TopicAuthorizationFailedError as error:
                raise RecordRefused(record, explain(error)) from error
            except TROUBLE as error:
                self._outage.failed("asking for topics", error)
            await asyncio.sleep(RETRY_SECONDS)

    async def without_place(self, records: Iterable[OutgoingRecord]) -> list[OutgoingRecord]:
        """Those whose topic or partition, which a request named for its answer, is not there any more.

        Our own topics are waited for. Raises KafkaError, OSError or TimeoutError when nobody can say.
        """
        foreign = [record for record in records if record.topic not in self._topics]
        if not foreign:
            return []
        async with asyncio.timeout(TOPIC_SECONDS):
            cluster = await self._producer.current.client.fetch_all_metadata()
        there = {topic: cluster.partitions_for_topic(topic) or () for topic in {record.topic for record in foreign}}
        return [
            record
            for record in foreign
            if not there[record.topic] or (record.partition is not None and record.partition not in there[record.topic])
        ]

    async def send(self, records: Sequence[OutgoingRecord]) -> None:
        """Returns when every record is acknowledged, however long brokers are away.

        Raises RecordRefused for a record that the cluster will never take, when the others are acknowledged;
        PublisherClosed when `close` came first.
        """
        outcomes = await asyncio.gather(*map(self._deliver, records), return_exceptions=True)
        for outcome in outcomes:
            if outcome is not None:
                raise outcome

    async def send_soon(self, record: OutgoingRecord) -> None:
        """Sends in the order of these calls; a failure is only logged and counted in `lost_deltas`.

        Waits only while MAX_WAITING_DELTAS others wait.
        """
        await self._deltas.put(record)

    async def close(self) -> None:
        """Sends what is waiting, for STOP_SECONDS at most, and disconnects."""
        if self._streaming is None:
            return
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self._deltas.join()
        except TimeoutError:
            log.warning("deltas_unsent", count=self._deltas.qsize())
        tasks = [self._streaming, *self._replacing]
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        await self._producer.close()

    async def _deliver(self, record: OutgoingRecord) -> None:
        while True:
            producer = self._producer.current
            try:
                acknowledgement = await self._enqueue(producer, record)
            except NOT_ENQUEUED as error:
                self._raise_permanent(record, error)
                self._outage.failed("sending", error)
            except TROUBLE as error:
                self._outage.failed("sending", error)
                await self._producer.replace(producer)
            else:
                try:
                    await self._acknowledged(acknowledgement)
                    return
                except TROUBLE as error:
                    self._outage.failed("sending", error)
                    await self._producer.replace(producer)
                    self._raise_permanent(record, error)
            await asyncio.sleep(RETRY_SECONDS)

    async def _acknowledged(self, acknowledgement: asyncio.Future[Any]) -> None:
        while not (await asyncio.wait([acknowledgement], timeout=SLOW_SECONDS))[0]:
            self._outage.failed("sending", "no acknowledgement yet")
        acknowledgement.result()
        self._outage.over()

    def _raise_permanent(self, record: OutgoingRecord, error: Exception) -> None:
        if isinstance(error, PERMANENT):
            self._outage.over()
            raise RecordRefused(record, explain(error)) from error

    async def _enqueue(self, producer: AIOKafkaProducer, record: OutgoingRecord) -> asyncio.Future[Any]:
        await self._require_place(producer, record)
        return await enqueue(producer, record)

    async def _require_place(self, producer: AIOKafkaProducer, record: OutgoingRecord) -> None:
        partitions = await self._partitions(producer, record)
        if record.partition is not None and record.partition not in partitions:
            raise RecordRefused(record, f"there is no partition {record.partition}")

    async def _partitions(self, producer: AIOKafkaProducer, record: OutgoingRecord) -> set[int]:
        try:
            async with asyncio.timeout(TOPIC_SECONDS):
                partitions: set[int] = await producer.partitions_for(record.topic)
                return partitions
        except TimeoutError:
            if await self._is_missing(producer, record.topic):
                raise RecordRefused(record, "there is no such topic") from None
            raise KafkaTimeoutError(f"no metadata of topic {record.topic}") from None

    async def _is_missing(self, producer: AIOKafkaProducer, topic: str) -> bool:
        try:
            return topic not in (await producer.client.fetch_all_metadata()).topics()
        except KafkaError:
            return False  # brokers are away: nobody knows

    async def _stream(self) -> None:
        while True:
            record = await self._deltas.get()
            try:
                await self._start_delta(record)
            except Exception as error:
                self._lose_delta(record, error)
            finally:
                self._deltas.task_done()

    async def _start_delta(self, record: OutgoingRecord) -> None:
        while True:
            producer = self._producer.current
            try:
                acknowledgement = await self._enqueue(producer, record)
            except KafkaTimeoutError as error:
                self._outage.failed("sending", error)
                continue
            except ProducerClosed:
                continue  # replaced just now
            break

        def finished(future: asyncio.Future[Any]) -> None:
            if future.cancelled():
                return
            if (error := future.exception()) is None:
                self._outage.over()
            else:
                self._lose_delta(record, error)
                task = asyncio.ensure_future(self._producer.replace(producer))
                self._replacing.add(task)
                task.add_done_callback(self._replacing.discard)

        acknowledgement.add_done_callback(finished)

    def _lose_delta(self, record: OutgoingRecord, error: BaseException) -> None:
        self.lost_deltas += 1
        log.warning("delta_lost", topic=record.topic, reason=explain(error), lost_so_far=self.lost_deltas)
