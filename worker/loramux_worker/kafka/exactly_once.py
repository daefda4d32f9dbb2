"""Exactly-once: answers and offsets in one transaction.

    claimed     whatever this worker had begun is over, and no transaction with the partition's offset is open;
                what is committed then is where it stands
    answered    the answer waits in the outbox for the next transaction
    in doubt    a failed transaction may have succeeded: its producer is discarded, and its partitions are claimed
                again. What is committed then tells
    lost        the group has gone on without us: the coordinator refuses what we commit of the partition

Readers see committed answers alone (`isolation.level=read_committed`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence

from loramux_schemas import KafkaConnection
from loramux_worker.kafka.assignment import Assignment, Partition
from loramux_worker.kafka.commits import COMMIT_SECONDS
from loramux_worker.kafka.group_offsets import Commit, committed
from loramux_worker.kafka.outbox import Outbox
from loramux_worker.kafka.publisher import Publisher
from loramux_worker.kafka.records import OutgoingRecord, Record
from loramux_worker.kafka.transactions import Transactions


class ExactlyOnce:
    """The commits of an intake, and the delivery of a front.

    `publisher` knows the topics that answers go to.
    """

    def __init__(self, connection: KafkaConnection, *, topic: str, group_id: str, publisher: Publisher) -> None:
        self._connection = connection
        self._topic = topic
        self._group_id = group_id
        self._publisher = publisher
        self._transactions = Transactions(connection, topic=topic, group_id=group_id)
        self.outage = self._transactions.outage

    @property
    def transactions(self) -> Counter[str]:
        """Transactions by outcome: committed, failed or fenced."""
        return self._transactions.outcomes

    def attach(self, assignment: Assignment) -> None:
        """The partitions to commit."""
        self._assignment = assignment
        self._outbox = Outbox(assignment, self._transactions, self._publisher.without_place)

    async def claim(self, numbers: Collection[int]) -> dict[int, Commit | None]:
        """What is committed for these partitions, where nobody has yet to end a transaction with them.

        Raises KafkaError, OSError or TimeoutError when there are no such.
        """
        await self._outbox.rest()  # or what is read next might be outdated in the next moment
        await self._transactions.ready()
        commits = await committed(self._connection, self._group_id, self._topic, numbers)
        self.outage.over()  # the next transaction may be long in coming, where nobody asks anything
        return commits

    def opened(self, partition: Partition) -> None:
        """The partition may be committed from now on, perhaps again."""
        self._outbox.reopened(partition)

    def lost(self, partitions: Collection[Partition]) -> None:
        """These are somebody else's, or were meanwhile: what waits for their transactions waits in vain."""
        self._outbox.lost(partitions)

    async def complete(self, record: Record, outgoing: Sequence[OutgoingRecord]) -> None:
        """Returns when the answers to `record` are committed together with its offset.

        Does nothing for a record whose partition went to another worker. Raises RecordRefused for an answer
        that the cluster does not take, CancelledError when the partition is lost meanwhile.
        """
        for answer in outgoing:
            await self._publisher.require_place(answer)
        partition = self._assignment.held(record.partition, record.epoch)
        if partition is not None:
            await self._outbox.answered(partition, record.offset, tuple(outgoing))

    async def commit(self) -> None:
        """Commits what waits now. What fails is logged and tried again; raises nothing."""
        await self._outbox.flush(COMMIT_SECONDS)

    async def close(self) -> None:
        """Commits nothing more and disconnects."""
        await self._outbox.close()
        await self._transactions.close()
