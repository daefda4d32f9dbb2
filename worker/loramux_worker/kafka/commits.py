"""How far a group has come: how that is read when a partition begins, and how it is written."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Set
from typing import TYPE_CHECKING, Final, Protocol

import structlog
from aiokafka.errors import CommitFailedError, IllegalStateError

from loramux_schemas import KafkaConnection
from loramux_worker.kafka.connecting import TROUBLE
from loramux_worker.kafka.group_offsets import Commit, committed
from loramux_worker.kafka.metadata import encode
from loramux_worker.kafka.outage import Outage, explain

if TYPE_CHECKING:
    from loramux_worker.kafka.assignment import Assignment, Partition

COMMIT_SECONDS: Final = 5.0

log = structlog.get_logger(__name__)


class Commits(Protocol):
    """What an assignment needs of a way to commit. `attach` comes before everything else."""

    outage: Outage

    def attach(self, assignment: Assignment) -> None:
        """The partitions to commit."""

    async def claim(self, numbers: Collection[int]) -> dict[int, Commit | None]:
        """What is committed for these partitions, once nobody else can commit to them any more.

        Those that the cluster cannot speak of yet are left out. Raises KafkaError, OSError or TimeoutError when
        there are no others.
        """

    def opened(self, partition: Partition) -> None:
        """The partition may be read and committed from now on, perhaps again."""

    def lost(self, partitions: Collection[Partition]) -> None:
        """These are somebody else's, or were meanwhile: nothing is committed for them any more."""

    async def commit(self) -> None:
        """Commits what is due. What fails is logged and tried again later; raises nothing."""

    async def close(self) -> None:
        """Commits nothing more and lets go of what it holds."""


async def commit_of(assignment: Assignment, partition: Partition, answered: Set[int] = frozenset()) -> Commit:
    """What to commit for a partition whose requests at the offsets `answered` are answered too."""
    tracker = partition.tracker
    idle = None
    if tracker.in_flight <= len(answered):
        idle = await assignment.consumer.position(partition.name)
    position, above = tracker.commit(answered, idle)
    return Commit(position, encode(position, above))


class PlainCommits:
    """Commits of the consumer itself, which the group's generation fences. Kafka's usual way, at-least-once."""

    def __init__(self, connection: KafkaConnection, *, topic: str, group_id: str) -> None:
        self.outage = Outage("committing")
        self._connection = connection
        self._topic = topic
        self._group_id = group_id
        self._lock = asyncio.Lock()

    def attach(self, assignment: Assignment) -> None:
        """The partitions to commit."""
        self._assignment = assignment

    async def claim(self, numbers: Collection[int]) -> dict[int, Commit | None]:
        """What is committed for these partitions. Raises KafkaError, OSError or TimeoutError."""
        commits = await committed(self._connection, self._group_id, self._topic, numbers)
        self.outage.over()  # what is due next may be long in coming, where nobody asks anything
        return commits

    def opened(self, partition: Partition) -> None:
        """Nothing to do: every open partition is looked at by `commit`."""

    def lost(self, partitions: Collection[Partition]) -> None:
        """Nothing to do: see `opened`."""

    async def commit(self) -> None:
        """Commits what changed. What fails is logged and tried again with the next commit; raises nothing."""
        async with self._lock:
            try:
                async with asyncio.timeout(COMMIT_SECONDS):
                    due = await self._send()
            except (CommitFailedError, IllegalStateError) as error:
                # A rebalance: partitions are opened anew, and what still is ours is committed then.
                log.info("commit_deferred", reason=explain(error))
            except TROUBLE as error:
                self.outage.failed("committing", error)
            else:
                for partition, commit in due.items():
                    partition.confirm(commit)
                if due:
                    self.outage.over()

    async def close(self) -> None:
        """Nothing to let go of."""

    async def _send(self) -> dict[Partition, Commit]:
        due = {}
        for partition in self._assignment.open_partitions():
            commit = await commit_of(self._assignment, partition)
            if commit != partition.committed:
                due[partition] = commit
                partition.unconfirmed.add(commit)
        if due:
            await self._assignment.consumer.commit({each.name: tuple(due[each]) for each in due})
        return due
