"""Exactly-once: answers and offsets in one transaction of the input partition's own producer.

    claimed     the partition's producer is started, which ends whatever a former owner had begun; then the
                group's commit is read, which cannot change any more but by us
    answered    the answer waits in the partition's outbox for the next transaction
    in doubt    a failed transaction may have succeeded: its producer is discarded, and the partition claimed
                again. What is committed then tells
    lost        the producer is discarded; the next owner's start ends what it had begun

Readers see committed answers alone (`isolation.level=read_committed`).
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Collection, Coroutine, Sequence
from functools import partial
from typing import Any, Final

import structlog

from loramux_schemas import KafkaConnection
from loramux_worker.kafka.assignment import Assignment, Partition
from loramux_worker.kafka.commits import COMMIT_SECONDS
from loramux_worker.kafka.connecting import TROUBLE
from loramux_worker.kafka.group_offsets import Commit, committed
from loramux_worker.kafka.outage import Outage
from loramux_worker.kafka.outbox import Outbox
from loramux_worker.kafka.publisher import Publisher
from loramux_worker.kafka.records import OutgoingRecord, Record
from loramux_worker.kafka.transactions import TransactionalProducer, TransactionFailed, transactional_id

STARTS_AT_ONCE: Final = 16
FENCE_SECONDS: Final = 10.0

log = structlog.get_logger(__name__)


class ExactlyOnce:
    """The commits of an intake, and the delivery of a front.

    `publisher` knows the topics that answers go to. `transactions` counts them by outcome: committed, failed or
    fenced.
    """

    def __init__(self, connection: KafkaConnection, *, topic: str, group_id: str, publisher: Publisher) -> None:
        self.outage = Outage("transactions")
        self.transactions: Counter[str] = Counter(committed=0, failed=0, fenced=0)
        self._connection = connection
        self._topic = topic
        self._group_id = group_id
        self._publisher = publisher
        self._producers: dict[int, TransactionalProducer] = {}
        self._outboxes: dict[Partition, Outbox] = {}
        self._starting = asyncio.Semaphore(STARTS_AT_ONCE)
        self._closing: set[asyncio.Task[None]] = set()

    def attach(self, assignment: Assignment) -> None:
        """The partitions to commit."""
        self._assignment = assignment

    async def claim(self, numbers: Collection[int]) -> dict[int, Commit | None]:
        """What is committed for these partitions, once nobody else can commit to them any more.

        Those whose coordinator does not answer yet are left out. Raises KafkaError, OSError or TimeoutError when
        there are no others.
        """
        numbers = list(numbers)
        fences = await asyncio.gather(*map(self._fence, numbers), return_exceptions=True)
        failures = [fence for fence in fences if fence is not None]
        ours = [number for number, fence in zip(numbers, fences, strict=True) if fence is None]
        if failures and not (ours and all(isinstance(failure, TROUBLE) for failure in failures)):
            raise failures[0]
        commits = await committed(self._connection, self._group_id, self._topic, ours)
        self.outage.over()  # the next transaction may be long in coming, where nobody asks anything
        return commits

    def opened(self, partition: Partition) -> None:
        """The partition may be committed from now on, perhaps again."""
        if partition not in self._outboxes:
            transact = partial(self._transact, partition)
            self._outboxes[partition] = Outbox(self._assignment, partition, transact, self._publisher.check_place)
        self._outboxes[partition].reopened()

    def lost(self, partition: Partition) -> None:
        """The partition is somebody else's, or was meanwhile: what waits for its transactions waits in vain."""
        self._discard(partition.number)
        if (outbox := self._outboxes.pop(partition, None)) is not None:
            self._aside(outbox.close())

    def keep(self, numbers: Collection[int]) -> None:
        """No other partitions than these are ours."""
        for number in self._producers.keys() - set(numbers):
            self._discard(number)

    async def complete(self, record: Record, outgoing: Sequence[OutgoingRecord]) -> None:
        """Returns when the answers to `record` are committed together with its offset.

        Does nothing for a record whose partition went to another worker. Raises RecordRefused for an answer
        that the cluster does not take, CancelledError when the partition is lost meanwhile.
        """
        for answer in outgoing:
            await self._publisher.require_place(answer)
        partition = self._assignment.held(record.partition, record.epoch)
        if partition is not None and partition in self._outboxes:
            await self._outboxes[partition].answered(record.offset, tuple(outgoing))

    async def commit(self) -> None:
        """Commits what waits now. What fails is logged and tried again; raises nothing."""
        flushes = [asyncio.ensure_future(outbox.flush()) for outbox in self._outboxes.values()]
        if flushes:
            await asyncio.wait(flushes, timeout=COMMIT_SECONDS)
        for flush in flushes:
            flush.cancel()

    async def close(self) -> None:
        """Commits nothing more and disconnects."""
        for partition in list(self._outboxes):
            self.lost(partition)
        self.keep(())
        if self._closing:
            await asyncio.wait(self._closing)

    async def _fence(self, number: int) -> None:
        """The partition's producer is there, and nobody else's."""
        for partition, outbox in list(self._outboxes.items()):
            if partition.number == number:
                await outbox.rest()  # or what is read next might be outdated in the next moment
        if number in self._producers:
            return
        producer = TransactionalProducer(self._connection, transactional_id(self._group_id, self._topic, number))
        async with self._starting, asyncio.timeout(FENCE_SECONDS):
            await producer.start()
        self._producers[number] = producer

    async def _transact(self, partition: Partition, records: list[OutgoingRecord], commit: Commit) -> None:
        outcome = "failed"
        producer = self._producers[partition.number]
        try:
            await producer.commit(records, partition.name, commit, self._group_id)
            outcome = "committed"
        except TransactionFailed as failed:
            outcome = "fenced" if failed.fenced else "failed"
            log.info("transaction_failed", partition=partition.number, fenced=failed.fenced, reason=str(failed))
            self.outage.failed("committing answers", str(failed))
            raise
        finally:
            self.transactions[outcome] += 1
            if outcome == "committed":
                self.outage.over()
            elif self._producers.get(partition.number) is producer:
                self._discard(partition.number)

    def _discard(self, number: int) -> None:
        if (producer := self._producers.pop(number, None)) is not None:
            self._aside(producer.close())

    def _aside(self, closing: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(closing)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)
