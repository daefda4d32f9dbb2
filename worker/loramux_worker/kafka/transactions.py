"""The transactions of a worker: one after the other, of one producer, whichever partitions it has.

One transaction holds answers to requests of any of our partitions and how far we have come in each, so that a
worker's transactions a second do not grow with its partitions. Who may commit a partition is decided by the group's
generation (KIP-447): the coordinator refuses offsets of a member that it has gone on without, and whoever gets a
partition next reads its offset when no transaction with it is open any more.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

import structlog
from aiokafka import TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import GroupAuthorizationFailedError, TransactionalIdAuthorizationFailed
from aiokafka.protocol.admin import ApiVersionRequest

from loramux_schemas import KafkaConnection
from loramux_worker.errors import ConfigurationError
from loramux_worker.kafka.connecting import TROUBLE, client_options
from loramux_worker.kafka.group_offsets import Commit, Membership
from loramux_worker.kafka.outage import Outage, explain
from loramux_worker.kafka.records import OutgoingRecord
from loramux_worker.kafka.transactional_producer import TransactionalProducer, TransactionFailed

APPLICATION: Final = "loramux"
START_SECONDS: Final = 10.0
DESCRIBE_TRANSACTIONS: Final = 65  # the key of a request that brokers with real transactions know (Kafka 3.0)

log = structlog.get_logger(__name__)


def transactional_id(group_id: str, topic: str, worker: str) -> str:
    """The id of a worker's producers; `worker` is nobody else's, or two would fence each other."""
    return f"{APPLICATION}.{group_id}.{topic}.{worker}"


class Transactions:
    """The producer of the moment, made anew after a failure; not for two transactions at once.

    `outcomes` counts transactions: committed, failed or fenced.
    """

    def __init__(self, connection: KafkaConnection, *, topic: str, group_id: str) -> None:
        self.outage = Outage("transactions")
        self.outcomes: Counter[str] = Counter(committed=0, failed=0, fenced=0)
        self._connection = connection
        self._group_id = group_id
        self._known_as = transactional_id(group_id, topic, uuid.uuid4().hex)
        self._producer: TransactionalProducer | None = None
        self._starting = asyncio.Lock()
        self._closing: set[asyncio.Task[None]] = set()

    async def ready(self) -> None:
        """Returns when nothing that was begun before is open. Raises KafkaError, OSError or TimeoutError."""
        async with self._starting:
            if self._producer is None:
                producer = TransactionalProducer(self._connection, self._known_as)
                try:
                    async with asyncio.timeout(START_SECONDS):
                        await producer.start()
                except TROUBLE as error:
                    self.outage.failed("beginning a transaction", error)
                    raise
                self._producer = producer

    async def commit(
        self, records: Sequence[OutgoingRecord], commits: Mapping[TopicPartition, Commit], member: Membership
    ) -> None:
        """One transaction; `ready` comes before.

        Raises TransactionFailed, after which `ready` is what tells that it is over.
        """
        outcome = "failed"
        producer = self._producer
        assert producer is not None, "wait until ready"
        try:
            await producer.commit(records, commits, self._group_id, member)
            outcome = "committed"
        except TransactionFailed as failed:
            outcome = "fenced" if failed.fenced else "failed"
            numbers = sorted(name.partition for name in commits)
            log.info("transaction_failed", partitions=numbers, fenced=failed.fenced, reason=str(failed))
            self.outage.failed("committing answers", str(failed))
            raise
        finally:
            self.outcomes[outcome] += 1
            if outcome == "committed":
                self.outage.over()
            else:
                self._discard()

    async def close(self) -> None:
        """Disconnects."""
        self._discard()
        if self._closing:
            await asyncio.wait(self._closing)

    def _discard(self) -> None:
        if self._producer is not None:
            task = asyncio.create_task(self._producer.close())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)
            self._producer = None


async def require_transactions(connection: KafkaConnection, *, topic: str, group_id: str, timeout: float) -> None:
    """Raises ConfigurationError where the brokers have no transactions or do not let us use them."""
    instead = "or pass --delivery at_least_once"
    known_as = transactional_id(group_id, topic, "start")
    try:
        async with asyncio.timeout(timeout):
            if not await _has_transactions(connection):
                raise ConfigurationError(
                    f"--delivery exactly_once: {connection.bootstrap_servers} has no real transactions (an embedded "
                    f"broker?): use Apache Kafka 3.0 or newer, {instead}"
                )
            producer = TransactionalProducer(connection, known_as)
            await producer.start()
            await producer.close()
    except (TransactionalIdAuthorizationFailed, GroupAuthorizationFailedError):
        raise ConfigurationError(
            f"--delivery exactly_once: {connection.bootstrap_servers} refuses the transactional id '{known_as}': "
            f"allow WRITE and DESCRIBE on ids that begin with '{transactional_id(group_id, topic, '')}', {instead}"
        ) from None
    except TROUBLE as error:
        raise ConfigurationError(
            f"--delivery exactly_once: {connection.bootstrap_servers} began no transaction within {timeout:g} s "
            f"({explain(error)}): see to its transaction state topic, {instead}"
        ) from None


async def _has_transactions(connection: KafkaConnection) -> bool:
    client = AIOKafkaClient(**client_options(connection))
    try:
        await client.bootstrap()
        answer = await client.send(client.get_random_node(), ApiVersionRequest())
        return any(key == DESCRIBE_TRANSACTIONS for key, *_ in answer.api_versions)
    finally:
        await client.close()
