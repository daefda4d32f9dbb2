"""Transactions of one input partition: answers and the offset that says so, all or nothing.

One transactional id belongs to one partition of the requests topic, whichever worker has it: starting a producer
of that id ends what another one had begun, and forbids it any more. aiokafka speaks a version of the protocol in
which a group's generation does not fence offsets (before KIP-447), so this is the only fence.

What aiokafka leaves to its user, and is done here:

- a failed send does not fail the commit: every acknowledgement is waited for before;
- the offsets go after the answers: beside them, the broker refuses the answers for a moment, which costs 0.1 s;
- after a failure `abort` may end nothing: a producer that failed in any way is discarded, and the next start
  ends its transaction;
- states that cannot go on are assertions, and other exceptions come from a dead background task: all of them
  mean a failed transaction.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, Final

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    InvalidProducerEpoch,
    ProducerClosed,
    ProducerFenced,
    TopicAuthorizationFailedError,
    TransactionalIdAuthorizationFailed,
)
from aiokafka.protocol.admin import ApiVersionRequest

from loramux_schemas import KafkaConnection
from loramux_worker.errors import ConfigurationError, LoramuxError
from loramux_worker.kafka.connecting import TROUBLE, client_options
from loramux_worker.kafka.group_offsets import Commit
from loramux_worker.kafka.outage import explain
from loramux_worker.kafka.producer import stop
from loramux_worker.kafka.records import OutgoingRecord
from loramux_worker.kafka.sending import PERMANENT, RecordRefused, enqueue

APPLICATION: Final = "loramux"
# How long the transaction of a worker that died keeps readers from what was written after it, where no other
# worker takes its partition over.
TIMEOUT_MS: Final = 10_000
SECONDS: Final = 30.0  # after which a transaction is given up
DESCRIBE_TRANSACTIONS: Final = 65  # the key of a request that brokers with real transactions know (Kafka 3.0)


class TransactionFailed(LoramuxError):
    """A transaction is not known to have succeeded; it may have, unless there is a `refused` record.

    `fenced`: another producer of the id was started, or the transaction took longer than TIMEOUT_MS.
    """

    def __init__(self, reason: str, *, fenced: bool = False, refused: RecordRefused | None = None) -> None:
        super().__init__(reason)
        self.fenced = fenced
        self.refused = refused


def transactional_id(group_id: str, topic: str, partition: int | str) -> str:
    """The id that whoever owns this partition uses."""
    return f"{APPLICATION}.{group_id}.{topic}.{partition}"


class TransactionalProducer:
    """A producer of one transactional id. It is of no use after a failure."""

    def __init__(self, connection: KafkaConnection, known_as: str) -> None:
        self._producer = AIOKafkaProducer(
            **client_options(connection),
            transactional_id=known_as,
            transaction_timeout_ms=TIMEOUT_MS,
            acks="all",
            linger_ms=0,
            retry_backoff_ms=100,
            max_request_size=2**31 - 1,  # sizes are checked by topic, before a record comes here
        )

    async def start(self) -> None:
        """Returns when every other producer of this id is fenced and its last transaction is over.

        Waits while a broker is away. Raises KafkaError or OSError.
        """
        try:
            await self._producer.start()
        except BaseException:
            await self._producer.stop()
            raise

    async def commit(self, records: Sequence[OutgoingRecord], name: TopicPartition, at: Commit, group_id: str) -> None:
        """One transaction: `records`, and that the group has come to `at` in the partition `name`.

        Raises TransactionFailed.
        """
        try:
            async with asyncio.timeout(SECONDS):
                await self._producer.begin_transaction()
                await self._send(records)
                await self._producer.send_offsets_to_transaction({name: tuple(at)}, group_id)
                await self._producer.commit_transaction()
        except Exception as error:
            raise self._failure(records, error) from error

    async def close(self) -> None:
        """Disconnects; a transaction that is open is left to the next owner of the id."""
        self._producer._message_accumulator.fail_all(ProducerClosed())
        await stop(self._producer)

    async def _send(self, records: Sequence[OutgoingRecord]) -> None:
        acknowledgements: list[asyncio.Future[Any]] = []
        try:
            for record in records:
                acknowledgements.append(await enqueue(self._producer, record))  # noqa: PERF401 - some may have gone
        except BaseException:
            for acknowledgement in acknowledgements:
                acknowledgement.add_done_callback(_hear)
            raise
        outcomes = await asyncio.gather(*acknowledgements, return_exceptions=True)
        refused = [
            (len(record.value or b""), i)
            for i, (record, outcome) in enumerate(zip(records, outcomes, strict=True))
            if isinstance(outcome, PERMANENT)
        ]
        if refused:
            # A batch shares its fate: the largest record is to blame, and the others are tried again without it.
            _, i = max(refused)
            raise RecordRefused(records[i], explain(outcomes[i])) from outcomes[i]
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                raise outcome

    def _failure(self, records: Sequence[OutgoingRecord], error: Exception) -> TransactionFailed:
        if isinstance(error, RecordRefused):
            return TransactionFailed(str(error), refused=error)
        # What ended the transaction is told to those who wait for its end; the others hear of an illegal state.
        end = self._producer._txn_manager.wait_for_transaction_end()
        if end is not None and end.done() and not end.cancelled() and (cause := end.exception()) is not None:
            error = cause
        if isinstance(error, TopicAuthorizationFailedError):
            forbidden = next((record for record in records if record.topic in error.args[0]), None)
            refused = None if forbidden is None else RecordRefused(forbidden, "this worker may not write to it")
            return TransactionFailed(explain(error), refused=refused)
        return TransactionFailed(explain(error), fenced=isinstance(error, ProducerFenced | InvalidProducerEpoch))


def _hear(acknowledgement: asyncio.Future[Any]) -> None:
    """Nobody waits for it any more: asyncio is not to complain of its error."""
    if not acknowledgement.cancelled():
        acknowledgement.exception()


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
