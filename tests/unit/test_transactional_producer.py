"""The order in which a transaction is made, and who may make one; the rest is tested on a real broker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from aiokafka import TopicPartition

from loramux_schemas import KafkaConnection
from loramux_worker.kafka.group_offsets import Commit, Membership
from loramux_worker.kafka.records import OutgoingRecord
from loramux_worker.kafka.transactional_producer import TransactionalProducer, TransactionFailed

COMMITS = {TopicPartition("requests", 0): Commit(6, "")}


class Library:
    """aiokafka's producer, as far as a transaction needs it; sends are acknowledged when the test says so."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.acknowledgement: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def begin_transaction(self) -> None:
        self.calls.append("begin")

    async def send(self, topic: str, **fields: object) -> asyncio.Future[None]:
        self.calls.append("send")
        return self.acknowledgement

    async def send_offsets_to_transaction(self, offsets: object, group_id: str) -> None:
        self.calls.append("offsets")

    async def commit_transaction(self) -> None:
        self.calls.append("commit")


@pytest.fixture
async def producer() -> AsyncIterator[TransactionalProducer]:
    producer = TransactionalProducer(KafkaConnection(bootstrap_servers="127.0.0.1:1"), "loramux.g.t.w")
    real = producer._producer
    yield producer
    producer._producer = real
    await producer.close()


async def test_offsets_wait_for_the_answers(producer: TransactionalProducer) -> None:
    """Beside them, the broker refuses answers for a moment, and aiokafka tries again after 0.1 s."""
    producer._producer = library = Library()
    records = [OutgoingRecord("replies", b"key", b"value")] * 2
    committing = asyncio.create_task(producer.commit(records, COMMITS, "group", Membership(1, "this worker")))
    await asyncio.sleep(0.05)
    assert library.calls == ["begin", "send", "send"]
    library.acknowledgement.set_result(None)
    await committing
    assert library.calls == ["begin", "send", "send", "offsets", "commit"]


async def test_a_worker_that_is_in_no_group_commits_nothing(producer: TransactionalProducer) -> None:
    """A broker takes offsets from a client that names no member, for the sake of old ones."""
    producer._producer = library = Library()
    with pytest.raises(TransactionFailed, match="in no group") as failed:
        await producer.commit([], COMMITS, "group", Membership(-1, ""))
    assert failed.value.fenced
    assert library.calls == []
