"""Exactly-once delivery beside the way: claims that come too late, transactions that fail, places that are gone.

Kafka is a stand-in here; what it does of itself is tested on a real broker in tests/integration.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from aiokafka import TopicPartition
from aiokafka.errors import IllegalStateError

from loramux_worker.kafka import exactly_once, outbox, transactions
from loramux_worker.kafka.assignment import Assignment
from loramux_worker.kafka.exactly_once import ExactlyOnce
from loramux_worker.kafka.group_offsets import Commit, Membership, OffsetsUnstable
from loramux_worker.kafka.records import OutgoingRecord, Record
from loramux_worker.kafka.sending import RecordRefused
from loramux_worker.kafka.transactional_producer import TransactionFailed


class Cluster:
    """What the group has committed, how often a producer was started, and how transactions are to end."""

    def __init__(self) -> None:
        self.committed = {number: Commit(5, "") for number in range(4)}
        self.claims: list[list[int]] = []
        self.claims_take: list[float] = []  # seconds, of the next ones
        self.transactions_take = 0.02
        self.generation = 0
        self.sent: list[list[OutgoingRecord]] = []
        self.members: list[Membership] = []
        self.failing = 0
        self.fenced = False
        self.unstable: set[int] = set()  # partitions of which a transaction is open
        self.gone: set[str] = set()
        self.assigned: set[int] = set()

    def assign(self, assignment: Assignment, *numbers: int) -> None:
        self.assigned = set(numbers)
        self.generation += 1
        assignment.on_partitions_assigned([TopicPartition("requests", number) for number in numbers])


class Producer:
    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    async def start(self) -> None:
        pass

    async def commit(
        self,
        records: list[OutgoingRecord],
        commits: dict[TopicPartition, Commit],
        group_id: str,
        member: Membership,
    ) -> None:
        self.cluster.members.append(member)
        await asyncio.sleep(self.cluster.transactions_take)
        self.cluster.sent.append(records)
        if self.cluster.fenced or self.cluster.failing:
            self.cluster.failing -= 1
            raise TransactionFailed("so it is to be", fenced=self.cluster.fenced)
        self.cluster.committed.update({name.partition: commit for name, commit in commits.items()})

    async def close(self) -> None:
        pass


class Consumer:
    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    @property
    def _coordinator(self) -> Membership:
        return Membership(self.cluster.generation, "this worker")

    def seek(self, name: TopicPartition, position: int) -> None:
        if name.partition not in self.cluster.assigned:
            raise IllegalStateError(f"{name} is not assigned")

    async def position(self, name: TopicPartition) -> int:
        return 5


class Places:
    """A publisher that knows where topics are, or that they have gone."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    async def require_place(self, record: OutgoingRecord) -> None:
        pass

    async def without_place(self, records: list[OutgoingRecord]) -> list[OutgoingRecord]:
        return [record for record in records if record.topic in self.cluster.gone]


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()

    async def committed(connection: object, group_id: str, topic: str, numbers: list[int]) -> dict[int, Commit]:
        cluster.claims.append(sorted(numbers))
        found = {number: cluster.committed[number] for number in set(numbers) - cluster.unstable}
        if cluster.claims_take:
            await asyncio.sleep(cluster.claims_take.pop(0))
        if not found:
            raise OffsetsUnstable
        return found

    monkeypatch.setattr(transactions, "TransactionalProducer", lambda connection, known_as: Producer(cluster))
    monkeypatch.setattr(exactly_once, "committed", committed)
    monkeypatch.setattr(outbox, "FENCED_SECONDS", 0.1)
    return cluster


@pytest.fixture
async def delivery(cluster: Cluster) -> Iterator[tuple[ExactlyOnce, Assignment]]:
    delivery = ExactlyOnce(None, topic="requests", group_id="group", publisher=Places(cluster))
    assignment = Assignment(topic="requests", window=100, commits=delivery, on_lost=lambda lost: None)
    assignment.attach(Consumer(cluster))
    yield delivery, assignment
    await assignment.close()
    await delivery.close()


async def until(condition) -> None:
    async with asyncio.timeout(5.0):
        while not condition():  # noqa: ASYNC110 - nothing tells
            await asyncio.sleep(0.01)


def answering(
    delivery: ExactlyOnce, assignment: Assignment, number: int, offset: int, topic: str = "replies"
) -> asyncio.Task[None]:
    partition = assignment.open_partition(number)
    partition.tracker.admit(offset)
    record = Record("requests", number, offset, None, b"", (), 0, partition.epoch)
    return asyncio.create_task(delivery.complete(record, [OutgoingRecord(topic, b"key", b"value")]))


async def test_a_partition_that_went_to_another_worker_is_not_claimed_back(
    cluster: Cluster, delivery: tuple[ExactlyOnce, Assignment]
) -> None:
    """A fenced transaction outlives the rebalance that gave its partition away."""
    exactly, assignment = delivery
    cluster.assign(assignment, 0)
    await until(lambda: assignment.open_partition(0))
    cluster.fenced = True
    answer = answering(exactly, assignment, 0, 5)
    await asyncio.sleep(0.01)
    await assignment.on_partitions_revoked([TopicPartition("requests", 0)])
    cluster.assign(assignment)
    await asyncio.sleep(0.4)
    assert cluster.claims == [[0]]
    assert not assignment.outage.active
    assert answer.cancelled()
    assert assignment.open_partitions() == []


async def test_a_partition_with_an_open_transaction_keeps_no_other_closed(
    cluster: Cluster, delivery: tuple[ExactlyOnce, Assignment]
) -> None:
    _, assignment = delivery
    cluster.unstable = {1}
    cluster.assign(assignment, 0, 1, 2)
    await until(lambda: {each.number for each in assignment.open_partitions()} == {0, 2})
    cluster.unstable = set()
    await until(lambda: {each.number for each in assignment.open_partitions()} == {0, 1, 2})


async def test_one_transaction_holds_the_answers_of_all_partitions(
    cluster: Cluster, delivery: tuple[ExactlyOnce, Assignment]
) -> None:
    exactly, assignment = delivery
    cluster.assign(assignment, 0, 1, 2)
    await until(lambda: len(assignment.open_partitions()) == 3)
    await asyncio.wait_for(asyncio.gather(*(answering(exactly, assignment, n, 5) for n in (0, 1, 2))), 5.0)
    assert [len(records) for records in cluster.sent] == [3]
    assert {number: at.position for number, at in cluster.committed.items()} == {0: 6, 1: 6, 2: 6, 3: 5}


async def test_a_partition_that_is_lost_in_a_transaction_takes_nothing_from_the_others(
    cluster: Cluster, delivery: tuple[ExactlyOnce, Assignment]
) -> None:
    """What of it was committed is committed; what is still ours goes on as the new member."""
    exactly, assignment = delivery
    cluster.assign(assignment, 0, 1)
    await until(lambda: len(assignment.open_partitions()) == 2)
    lost, kept = (answering(exactly, assignment, number, 5) for number in (0, 1))
    await until(lambda: cluster.members)
    cluster.assign(assignment, 1)
    await asyncio.wait_for(kept, 5.0)
    with pytest.raises(asyncio.CancelledError):
        await lost
    await until(lambda: assignment.open_partition(1))
    await asyncio.wait_for(answering(exactly, assignment, 1, 6), 5.0)
    assert cluster.members == [Membership(1, "this worker"), Membership(2, "this worker")]


async def test_a_flush_commits_all_that_waits(
    cluster: Cluster, delivery: tuple[ExactlyOnce, Assignment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rebalance waits for it: what is not committed by then is generated again by another worker."""
    monkeypatch.setattr(outbox, "MAX_ANSWERS", 3)
    exactly, assignment = delivery
    cluster.assign(assignment, 0, 1)
    await until(lambda: len(assignment.open_partitions()) == 2)
    answers = [answering(exactly, assignment, i % 2, 5 + i) for i in range(10)]
    await asyncio.sleep(0)
    await asyncio.wait_for(exactly.commit(), 5.0)
    assert all(answer.done() for answer in answers)
    assert [len(records) for records in cluster.sent] == [3, 3, 3, 1]
    await asyncio.wait_for(exactly.commit(), 1.0)


async def test_a_transaction_that_fails_after_a_rebalance_is_settled_once(
    cluster: Cluster, delivery: tuple[ExactlyOnce, Assignment], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The partition is being opened by then: opened twice, its next transaction would be taken for failed."""
    monkeypatch.setattr(exactly_once, "COMMIT_SECONDS", 0.01)
    exactly, assignment = delivery
    cluster.assign(assignment, 0)
    await until(lambda: assignment.open_partition(0))
    cluster.failing, cluster.transactions_take = 1, 0.1
    cluster.claims_take = [0.0, 0.1]
    answer = answering(exactly, assignment, 0, 5)
    await until(lambda: cluster.members)
    await assignment.on_partitions_revoked([TopicPartition("requests", 0)])
    cluster.assign(assignment, 0)
    await asyncio.wait_for(answer, 5.0)
    await asyncio.sleep(0.3)
    assert [len(records) for records in cluster.sent] == [1, 1], "one that failed, and one"


async def test_what_waits_for_a_topic_that_has_gone_is_refused_and_the_others_go(
    cluster: Cluster, delivery: tuple[ExactlyOnce, Assignment]
) -> None:
    exactly, assignment = delivery
    cluster.assign(assignment, 0)
    await until(lambda: assignment.open_partition(0))
    cluster.gone, cluster.failing = {"private"}, 1
    private = answering(exactly, assignment, 0, 5, "private")
    other = answering(exactly, assignment, 0, 6)
    await asyncio.wait_for(other, 5.0)
    with pytest.raises(RecordRefused, match="private"):
        await private
    assert [record.topic for record in cluster.sent[-1]] == ["replies"]


async def test_what_fails_is_tried_in_smaller_transactions(
    cluster: Cluster, delivery: tuple[ExactlyOnce, Assignment], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "MAX_ANSWERS", 8)
    exactly, assignment = delivery
    cluster.assign(assignment, 0)
    await until(lambda: assignment.open_partition(0))
    cluster.failing = 2
    await asyncio.wait_for(asyncio.gather(*(answering(exactly, assignment, 0, 5 + i) for i in range(8))), 5.0)
    assert [len(records) for records in cluster.sent] == [8, 4, 2, 6]
