"""Polling the consumer without losing, repeating or over-reading anything."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Iterable
from typing import Final

import structlog
from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.errors import ConsumerStoppedError, CorruptRecordException, KafkaError, OffsetOutOfRangeError

from loramux_schemas import KafkaConnection
from loramux_worker.kafka.assignment import Assignment, Partition
from loramux_worker.kafka.connecting import RETRY_SECONDS, TROUBLE
from loramux_worker.kafka.outage import Outage
from loramux_worker.kafka.records import Record
from loramux_worker.kafka.tolerant_fetch import fetch_tolerantly
from loramux_worker.kafka.tracker import Admission

FULL_POLL_SECONDS: Final = 0.1  # how soon a partition that was full is looked at again
FETCH_SECONDS: Final = 10.0

log = structlog.get_logger(__name__)


class Reader:
    """Takes records of the assignment's open partitions and admits them to their trackers.

    `restart` replaces a consumer one of whose background tasks has died.
    """

    def __init__(
        self, connection: KafkaConnection, assignment: Assignment, restart: Callable[[], Awaitable[None]]
    ) -> None:
        self.outage = Outage("reading")
        self._connection = connection
        self._assignment = assignment
        self._restart = restart

    async def poll(self, max_records: int, wait: float, besides: Collection[int] = ()) -> list[Record]:
        """At most `max_records` new records, none of the partitions `besides`.

        May return none before `wait` seconds are over.
        """
        open_now = self._assignment.open_partitions()
        readable = [each for each in open_now if not each.tracker.is_full and each.number not in besides]
        if not readable or max_records < 1:
            await self._assignment.changed(wait)
            return []
        if len(readable) < len(open_now):
            wait = min(wait, FULL_POLL_SECONDS)
        limit = min(max_records, *(partition.tracker.room for partition in readable))
        try:
            # getmany keeps to its own timeout, except when a rebalance begins inside it. Cancelling it is
            # safe: it never waits while it holds records.
            async with asyncio.timeout(wait + 1.0):
                polled = await self._assignment.consumer.getmany(
                    *(partition.name for partition in readable),
                    timeout_ms=int(wait * 1000),
                    max_records=limit,
                )
        except TimeoutError:
            return []
        except Exception as error:
            return await self._recover(error, readable, limit)
        self.outage.over()
        return [record for name, messages in polled.items() for record in self._admit(name, messages)]

    def _admit(self, name: TopicPartition, messages: Iterable[ConsumerRecord]) -> list[Record]:
        partition = self._assignment.open_partition(name.partition)
        if partition is None:
            return []  # a rebalance came between; the partition's position is set anew when it is opened
        records = []
        for message in messages:
            admission = partition.tracker.admit(message.offset)
            if admission is Admission.NO_ROOM:
                self._assignment.consumer.seek(name, message.offset)
                break
            if admission is Admission.NEW:
                records.append(to_record(message, partition.epoch))
        return records

    async def _recover(self, error: Exception, readable: list[Partition], limit: int) -> list[Record]:
        # getmany may have thrown away records of other partitions that it had counted as consumed.
        self._seek_back()
        try:
            async with asyncio.timeout(FETCH_SECONDS):
                if isinstance(error, UnicodeDecodeError | CorruptRecordException):
                    return await self._read_tolerantly(readable, limit)
                self.outage.failed("reading", error)
                if isinstance(error, OffsetOutOfRangeError):
                    await self._leave_lost_range(error)
                elif type(error) is KafkaError or isinstance(error, ConsumerStoppedError):
                    # aiokafka's words for "a background task died" and "the last restart did not succeed"
                    await self._restart()
                elif not isinstance(error, TROUBLE):
                    log.error("poll_failed", exc_info=error)
        except TROUBLE as again:
            self.outage.failed("reading", again)
        await asyncio.sleep(RETRY_SECONDS)
        return []

    def _seek_back(self) -> None:
        for partition in self._assignment.open_partitions():
            self._assignment.consumer.seek(partition.name, partition.tracker.next_position)

    async def _read_tolerantly(self, readable: list[Partition], limit: int) -> list[Record]:
        for partition in readable:
            tracker = partition.tracker
            messages, behind = await fetch_tolerantly(self._connection, partition.name, tracker.next_position)
            if not partition.is_open:
                continue
            records = self._admit(partition.name, messages[:limit])
            if not messages or messages[-1].offset < tracker.next_position:
                tracker.skip_to(behind)
            if records:
                break  # what is admitted is in flight: nothing that can fail may come between that and its answer
        else:
            records = []
        self._seek_back()
        return records

    async def _leave_lost_range(self, error: OffsetOutOfRangeError) -> None:
        for name, position in dict(error.args[0]).items():
            first = (await self._assignment.consumer.beginning_offsets([name]))[name]
            log.error(
                "requests_lost_by_broker",
                topic=name.topic,
                partition=name.partition,
                position=position,
                first_available=first,
                hint="retention deleted unread requests, or the topic was truncated or created anew",
            )
            partition = self._assignment.open_partition(name.partition)
            if partition is None:
                continue
            if position < first:
                partition.tracker.skip_to(first)
                self._assignment.consumer.seek(name, first)
            else:
                self._assignment.begin_again(partition)


def to_record(message: ConsumerRecord, epoch: int) -> Record:
    """The client's record as ours."""
    return Record(
        topic=message.topic,
        partition=message.partition,
        offset=message.offset,
        key=message.key,
        value=message.value,
        headers=tuple(message.headers),
        timestamp_ms=message.timestamp,
        epoch=epoch,
    )
