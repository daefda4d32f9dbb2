"""A producer whose transactions hold answers and the offsets that say so, all or nothing.

What aiokafka leaves to its user, and is done here:

- it speaks a version of the protocol in which a group's generation does not fence offsets (before KIP-447): the
  request that commits them is ours, and names the member of the group;
- a failed send does not fail the commit: every acknowledgement is waited for before;
- the offsets go after the answers: beside them, the broker refuses the answers for a moment, which costs 0.1 s;
- after a failure `abort` may end nothing: a producer that failed in any way is discarded, and the next start
  ends its transaction;
- states that cannot go on are assertions, and other exceptions come from a dead background task: all of them
  mean a failed transaction.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final

from aiokafka import AIOKafkaProducer, TopicPartition
from aiokafka.client import CoordinationType
from aiokafka.errors import (
    GroupAuthorizationFailedError,
    IllegalGenerationError,
    InvalidProducerEpoch,
    ProducerClosed,
    ProducerFenced,
    TopicAuthorizationFailedError,
    UnknownMemberIdError,
    for_code,
)
from aiokafka.producer.sender import TxnOffsetCommitHandler
from aiokafka.protocol.transaction import TxnOffsetCommitResponse_v0

from loramux_schemas import KafkaConnection
from loramux_worker.errors import LoramuxError
from loramux_worker.kafka.connecting import client_options
from loramux_worker.kafka.group_offsets import Commit, Membership
from loramux_worker.kafka.offsets_protocol import TxnOffsetCommitRequest
from loramux_worker.kafka.outage import explain
from loramux_worker.kafka.producer import stop
from loramux_worker.kafka.records import OutgoingRecord
from loramux_worker.kafka.sending import PERMANENT, RecordRefused, enqueue

# How long the transaction of a worker that died keeps readers from what was written after it, and its partitions
# from being read by another worker. Brokers look for such as often as they are told to by
# transaction.abort.timed.out.transaction.cleanup.interval.ms: every 10 s, if nobody has said so.
TIMEOUT_MS: Final = 5_000
SECONDS: Final = 6.0  # after which a transaction is given up, as the coordinator does
NO_EPOCH: Final = -1  # of the partition's leader: nobody looks at it
STALE: Final = (IllegalGenerationError, UnknownMemberIdError)
FENCED: Final = (*STALE, ProducerFenced, InvalidProducerEpoch)


class TransactionFailed(LoramuxError):
    """A transaction is not known to have succeeded; it may have, unless there is a `refused` record.

    `fenced`: the group has gone on without us, or the transaction took longer than TIMEOUT_MS.
    """

    def __init__(self, reason: str, *, fenced: bool = False, refused: RecordRefused | None = None) -> None:
        super().__init__(reason)
        self.fenced = fenced
        self.refused = refused


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
        self._producer._sender._do_txn_offset_commit = self._commit_offsets
        self._member = Membership(-1, "")

    async def start(self) -> None:
        """Returns when every other producer of this id is fenced and its last transaction is over.

        Waits while a broker is away. Raises KafkaError or OSError.
        """
        try:
            await self._producer.start()
        except BaseException:
            await self._producer.stop()
            raise

    async def commit(
        self,
        records: Sequence[OutgoingRecord],
        commits: Mapping[TopicPartition, Commit],
        group_id: str,
        member: Membership,
    ) -> None:
        """One transaction: `records`, and that the group, of which we are `member`, has come to `commits`.

        Raises TransactionFailed.
        """
        if member.generation < 0:  # a broker takes it for a client from before KIP-447, and lets it commit
            raise TransactionFailed("this worker is in no group", fenced=True)
        self._member = member
        try:
            async with asyncio.timeout(SECONDS):
                await self._producer.begin_transaction()
                await self._send(records)
                await self._producer.send_offsets_to_transaction(
                    {name: tuple(commit) for name, commit in commits.items()}, group_id
                )
                await self._producer.commit_transaction()
        except Exception as error:
            raise self._failure(records, error) from error

    async def close(self) -> None:
        """Disconnects; a transaction that is open is left to the next producer of the id, or to its end of time."""
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

    async def _commit_offsets(self, offsets: dict[TopicPartition, Any], group_id: str) -> None:
        """In the place of the method of aiokafka's sender that says nothing of the member."""
        sender = self._producer._sender
        try:
            node = await sender._find_coordinator(CoordinationType.GROUP, group_id)
        except GroupAuthorizationFailedError as error:
            sender._txn_manager.error_transaction(error)
        else:
            await OffsetsOfMember(sender, offsets, group_id, self._member).do(node)

    def _failure(self, records: Sequence[OutgoingRecord], error: Exception) -> TransactionFailed:
        if isinstance(error, RecordRefused):
            return TransactionFailed(str(error), refused=error)
        # What ended the transaction is told to those who wait for its end; the others hear of an illegal state.
        end = self._producer._txn_manager.wait_for_transaction_end()
        if end is not None and end.done() and not end.cancelled() and (cause := end.exception()) is not None:
            error = cause if cause.__cause__ is None else cause.__cause__
        if isinstance(error, TopicAuthorizationFailedError):
            topics = {error.args[0]} if isinstance(error.args[0], str) else error.args[0]
            forbidden = next((record for record in records if record.topic in topics), None)
            refused = None if forbidden is None else RecordRefused(forbidden, "this worker may not write to it")
            return TransactionFailed(explain(error), refused=refused)
        return TransactionFailed(explain(error), fenced=isinstance(error, FENCED))


class OffsetsOfMember(TxnOffsetCommitHandler):  # type: ignore[misc]
    """Commits offsets in a transaction as a member of the group in one of its generations."""

    def __init__(self, sender: Any, offsets: dict[TopicPartition, Any], group_id: str, member: Membership) -> None:
        super().__init__(sender, offsets, group_id)
        self._member = member

    def create_request(self) -> TxnOffsetCommitRequest:
        """The request, with the offsets that are not acknowledged yet."""
        topics: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
        for name, offset in sorted(self._offsets.items()):
            topics[name.topic].append((name.partition, offset.offset, NO_EPOCH, offset.metadata, {}))
        manager = self._sender._txn_manager
        return TxnOffsetCommitRequest(
            manager.transactional_id,
            self._group_id,
            manager.producer_id,
            manager.producer_epoch,
            self._member.generation,
            self._member.member_id,
            None,
            [(topic, partitions, {}) for topic, partitions in topics.items()],
        )

    def handle_response(self, response: Any) -> float | None:
        """None, or in how many seconds to ask again. An outdated member ends the transaction."""
        errors = [(topic, [each[:2] for each in partitions]) for topic, partitions, _ in response.topics]
        for error in (for_code(code) for _, partitions in errors for _, code in partitions):
            if error in STALE:
                self._sender._txn_manager.error_transaction(error())
                return None
        again: float | None = super().handle_response(TxnOffsetCommitResponse_v0(0, errors))
        return again


def _hear(acknowledgement: asyncio.Future[Any]) -> None:
    """Nobody waits for it any more: asyncio is not to complain of its error."""
    if not acknowledgement.cancelled():
        acknowledgement.exception()
