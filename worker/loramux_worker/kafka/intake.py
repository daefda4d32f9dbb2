"""Requests out of Kafka: what is read, what is answered, what is committed.

    intake = Intake(connection, topic="lora.requests", group_id="loramux", on_lost=cancel)
    await intake.start()
    for record in await intake.take(max_records=64, timeout=0.5):
        …
        intake.done(record)                   # in any order
    await intake.close()

Only as much is read as the caller asks for, and nothing of a partition whose window is full: the backlog
stays in Kafka, where consumer lag shows it. A broker that goes away is waited for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any, Final

import structlog
from aiokafka import AIOKafkaConsumer

from loramux_schemas import KafkaConnection
from loramux_worker.errors import ConfigurationError
from loramux_worker.kafka.assignment import Assignment, OnLost
from loramux_worker.kafka.commits import Commits
from loramux_worker.kafka.connecting import TROUBLE, started
from loramux_worker.kafka.consumer import consumer_options, stop
from loramux_worker.kafka.outage import Outage
from loramux_worker.kafka.reader import Reader
from loramux_worker.kafka.records import Record

DEFAULT_WINDOW: Final = 8192
WATCH_SECONDS: Final = 3.0

log = structlog.get_logger(__name__)


class Intake:
    """One member of the consumer group on one topic.

    `commits` writes down what is answered. `window` bounds the offsets between a partition's watermark and its
    newest polled record. `on_lost` is called with the (partition, epoch) pairs that went to another worker: their
    sequences are to be cancelled, and `done` of their records is ignored. Times are in seconds.
    """

    def __init__(
        self,
        connection: KafkaConnection,
        *,
        topic: str,
        group_id: str,
        on_lost: OnLost,
        commits: Commits,
        window: int = DEFAULT_WINDOW,
        commit_interval: float = 0.5,
        startup_timeout: float = 30.0,
        session_timeout: float = 45.0,
    ) -> None:
        self._connection = connection
        self._topic = topic
        self._commit_interval = commit_interval
        self._startup_timeout = startup_timeout
        self._options: dict[str, Any] = consumer_options(connection, group_id, session_timeout)
        self._commits = commits
        self._assignment = Assignment(topic=topic, window=window, commits=self._commits, on_lost=on_lost)
        self._reader = Reader(connection, self._assignment, self._restart)
        self._outage = Outage("asking for the end of partitions")
        self._ends: dict[int, int] = {}
        self._housekeeping: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def assigned(self) -> frozenset[int]:
        """The partitions that are read now; empty until the first assignment and during a rebalance."""
        return frozenset(partition.number for partition in self._assignment.open_partitions())

    @property
    def trouble(self) -> str | None:
        """Why this worker gets no requests through no choice of its own; None while all is well."""
        outages = (self._outage, self._commits.outage, self._reader.outage, self._assignment.outage)
        if any(outage.active for outage in outages):
            return "Kafka is unavailable"
        return self._assignment.failure

    def lag(self) -> dict[int, int]:
        """For each partition that is read now, offsets between the committed one and its end."""
        lags = {}
        for partition in self._assignment.open_partitions():
            fetched = self._assignment.consumer.highwater(partition.name) or 0
            end = max(fetched, self._ends.get(partition.number, 0))
            lags[partition.number] = max(0, end - partition.committed.position)
        return lags

    def uncommitted(self) -> dict[int, int]:
        """For each partition that is read now, the answered requests above its watermark."""
        return {each.number: each.tracker.uncommitted for each in self._assignment.open_partitions()}

    async def start(self) -> None:
        """Joins the group; returns before partitions are assigned.

        Raises ConfigurationError when no broker answers within `startup_timeout` or the topic is not there.
        """
        consumer = await started(
            self._connection,
            lambda: AIOKafkaConsumer(**self._options),
            stop,
            timeout=self._startup_timeout,
        )
        try:
            if self._topic not in await consumer.topics():
                raise ConfigurationError(
                    f"--requests-topic: there is no topic '{self._topic}' on "
                    f"{self._connection.bootstrap_servers}: create it, or pass --create-topics"
                )
        except BaseException:
            await stop(consumer)
            raise
        self._subscribe(consumer)
        self._housekeeping = asyncio.create_task(self._keep_house(), name="intake-housekeeping")

    async def take(self, max_records: int, timeout: float, besides: Collection[int] = ()) -> list[Record]:
        """The next requests, at most `max_records`; empty after `timeout` without one, and when closed.

        The partitions `besides` are left alone.

        Cancelling it loses nothing, but a `wait_for` around it may: it can drop a result that came in time.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        while not self._closed:
            left = max(0.0, deadline - loop.time())
            records = await self._reader.poll(max_records, left, besides)
            if records or loop.time() >= deadline:
                return records
        return []

    def holds(self, record: Record) -> bool:
        """Whether the record's partition has been ours ever since it was taken."""
        return self._assignment.held(record.partition, record.epoch) is not None

    def done(self, record: Record) -> bool:
        """The record is answered; False, and without effect, when its partition was lost meanwhile."""
        partition = self._assignment.held(record.partition, record.epoch)
        return partition is not None and self._assignment.done(partition, record.offset)

    async def commit(self) -> None:
        """Commits what is due. What fails is logged and tried again later; raises nothing."""
        await self._commits.commit()

    async def close(self) -> None:
        """Commits and leaves the group."""
        if self._closed:
            return
        self._closed = True
        self._assignment.notify()
        if self._housekeeping is None:
            return
        self._housekeeping.cancel()
        await asyncio.wait([self._housekeeping])
        await self._assignment.close()
        await self.commit()
        await self._commits.close()
        await stop(self._assignment.consumer)

    def _subscribe(self, consumer: AIOKafkaConsumer) -> None:
        self._assignment.attach(consumer)
        consumer.subscribe([self._topic], listener=self._assignment)

    async def _restart(self) -> None:
        await stop(self._assignment.consumer)
        consumer = AIOKafkaConsumer(**self._options)
        try:
            await consumer.start()
        except BaseException:
            await stop(consumer)
            raise
        if self._closed:
            await stop(consumer)
        else:
            self._subscribe(consumer)

    async def _keep_house(self) -> None:
        loop = asyncio.get_running_loop()
        watched = loop.time()
        while True:
            await asyncio.sleep(self._commit_interval)
            try:
                await self.commit()
                if loop.time() - watched >= WATCH_SECONDS:
                    watched = loop.time()
                    await self._watch()
            except Exception as error:
                log.error("housekeeping_failed", exc_info=error)

    async def _watch(self) -> None:
        """Asks where the partitions end: for lag where nothing is fetched, and to notice an outage."""
        names = [partition.name for partition in self._assignment.open_partitions()]
        try:
            async with asyncio.timeout(WATCH_SECONDS):
                ends = await self._assignment.consumer.end_offsets(names)
        except TROUBLE as error:
            self._outage.failed("asking for the end of partitions", error)
            return
        self._ends = {name.partition: end for name, end in ends.items()}
        self._outage.over()
