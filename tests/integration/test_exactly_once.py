"""Transactions on a real broker: whatever fails in between, read_committed readers see one answer a request."""

from __future__ import annotations

import asyncio

import pytest
from aiokafka import AIOKafkaProducer
from aiokafka.client import AIOKafkaClient, CoordinationType
from aiokafka.protocol.group import LeaveGroupRequest

from delivery_rig import Member, ask, each_answered_once, joined
from intake_rig import connection, offsets
from loramux_worker.errors import ConfigurationError
from loramux_worker.kafka import outbox, transactional_producer
from loramux_worker.kafka.embedded import EmbeddedBroker
from loramux_worker.kafka.sending import RecordRefused
from loramux_worker.kafka.transactional_producer import TransactionalProducer, TransactionFailed
from loramux_worker.kafka.transactions import require_transactions
from services.kafka import KafkaCluster

pytestmark = pytest.mark.kafka

SECONDS = 30.0


async def dismiss(kafka: KafkaCluster, member: Member, group_id: str) -> None:
    """The group goes on without the member, which hears of it with its next heartbeat, seconds later."""
    client = AIOKafkaClient(bootstrap_servers=kafka.bootstrap_servers)
    await client.bootstrap()
    node = await client.coordinator_lookup(CoordinationType.GROUP, group_id)
    answer = await client.send(node, LeaveGroupRequest(group_id, member.intake._assignment.member.member_id))
    await client.close()
    assert answer.error_code == 0


@pytest.fixture
def topics(kafka_topics) -> tuple[str, str]:
    return kafka_topics("requests", partitions=2), kafka_topics("replies", partitions=2)


async def test_answers_and_offsets_come_together(kafka: KafkaCluster, topics: tuple[str, str]) -> None:
    requests, replies = topics
    await ask(kafka, requests, range(60))
    async with joined(Member(kafka, requests, replies)) as first:
        records = await first.take(60)
        odd = [record for record in records if int(record.value or b"") % 2]
        await asyncio.gather(*map(first.answer, reversed(odd)))
        await each_answered_once(kafka, replies, range(1, 60, 2))
        assert not await first.intake.take(10, 0.2)
    async with joined(Member(kafka, requests, replies)) as second:
        again = await second.take(30)
        assert sorted(int(record.value or b"") for record in again) == list(range(0, 60, 2))
        await asyncio.gather(*map(second.answer, again))
        await second.until_idle()
        assert second.delivery.transactions["committed"] >= 1
    await each_answered_once(kafka, replies, range(60))


async def test_a_worker_that_the_group_has_gone_on_without_commits_nothing(
    kafka: KafkaCluster, topics: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The zombie has answers ready; its heir commits others meanwhile."""
    requests, replies = topics
    monkeypatch.setattr(outbox, "FENCED_SECONDS", 0.5)
    await ask(kafka, requests, range(4), partition=0)
    async with joined(Member(kafka, requests, replies, heartbeat_seconds=4.0)) as zombie:
        records = await zombie.take(4)
        await zombie.answer(records[0])
        await dismiss(kafka, zombie, requests)
        async with joined(Member(kafka, requests, replies)) as heir:
            again = await heir.take(3)
            late = [zombie.answer(record) for record in records[1:]]
            await zombie.until(lambda: zombie.delivery.transactions["fenced"] > 0)
            await each_answered_once(kafka, replies, [0])
            await asyncio.gather(*map(heir.answer, again[:2]))
        done, _ = await asyncio.wait(late, timeout=SECONDS)
        assert all(task.cancelled() for task in done)
        assert zombie.lost == {(0, records[0].epoch)}
        [last] = await zombie.take(1)
        assert zombie.intake.trouble is None, "ready again, though it has committed nothing since"
        assert last.value == again[2].value
        await zombie.answer(last)
    await each_answered_once(kafka, replies, range(4))


@pytest.mark.parametrize("ends", [True, False], ids=["ends", "times out"])
async def test_a_partition_is_read_when_no_transaction_with_it_is_open(
    kafka: KafkaCluster, topics: tuple[str, str], monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    """The zombie stopped between its offsets and the end of the transaction."""
    requests, replies = topics
    monkeypatch.setattr(transactional_producer, "TIMEOUT_MS", 3_000)
    real, ending = AIOKafkaProducer.commit_transaction, [asyncio.Event()]

    async def commit_transaction(self: AIOKafkaProducer) -> None:
        if ending:
            await ending.pop().wait()
        await real(self)

    monkeypatch.setattr(AIOKafkaProducer, "commit_transaction", commit_transaction)
    end = ending[0]
    await ask(kafka, requests, range(4), partition=0)
    async with joined(Member(kafka, requests, replies, heartbeat_seconds=60.0)) as zombie:
        records = await zombie.take(4)
        answering = list(map(zombie.answer, records[:2]))
        await zombie.until(lambda: not ending)
        await asyncio.sleep(0.2)
        await dismiss(kafka, zombie, requests)
        async with joined(Member(kafka, requests, replies)) as heir:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(heir.assigned([0]), 1.0)
            if ends:
                end.set()
            left = await heir.take(2 if ends else 4)
            assert offsets(left) == ([2, 3] if ends else [0, 1, 2, 3])
            await asyncio.gather(*map(heir.answer, left))
            end.set()
            await zombie.intake.close()
    assert [task.cancelled() for task in answering] == [not ends] * 2
    await each_answered_once(kafka, replies, range(4))


@pytest.mark.parametrize("happened", [True, False])
async def test_a_transaction_in_doubt_is_settled_by_what_is_committed(
    kafka: KafkaCluster, topics: tuple[str, str], monkeypatch: pytest.MonkeyPatch, happened: bool
) -> None:
    requests, replies = topics
    real, failures = TransactionalProducer.commit, iter([True])

    async def commit(self: TransactionalProducer, *arguments: object) -> None:
        fails = next(failures, False)
        if happened or not fails:
            await real(self, *arguments)
        else:
            await self._producer.begin_transaction()
            await self._send(arguments[0])
        if fails:
            raise TransactionFailed("the connection broke")

    monkeypatch.setattr(TransactionalProducer, "commit", commit)
    await ask(kafka, requests, range(5), partition=1)
    async with joined(Member(kafka, requests, replies)) as member:
        records = await member.take(5)
        await asyncio.wait_for(asyncio.gather(*map(member.answer, records)), SECONDS)
        assert member.delivery.transactions["failed"] == 1
        assert not member.lost
        await member.until_idle()
    await each_answered_once(kafka, replies, range(5))


async def test_an_answer_that_the_broker_refuses_harms_no_other(kafka: KafkaCluster, kafka_topics) -> None:
    requests = kafka_topics("requests")
    replies = kafka_topics("replies", config={"max.message.bytes": "2000"})
    await ask(kafka, requests, range(10))
    async with joined(Member(kafka, requests, replies)) as member:
        records = await member.take(10)
        good = [member.answer(record) for record in records[2:]]
        large = member.answer(records[0], b"0" * 5000)
        nowhere = member.answer(records[1], topic="there-is-none")
        results = await asyncio.wait_for(asyncio.gather(*good, large, nowhere, return_exceptions=True), SECONDS)
        assert results[:8] == [None] * 8
        assert isinstance(results[8], RecordRefused)
        assert isinstance(results[9], RecordRefused)
        await asyncio.gather(*map(member.answer, records[:2]))
        await member.until_idle()
    await each_answered_once(kafka, replies, range(10))


async def test_one_worker_becomes_four_and_one_again_under_load(kafka: KafkaCluster, kafka_topics) -> None:
    """What comes back to the first goes on, and nothing is answered twice."""
    requests, replies = kafka_topics("requests", partitions=8), kafka_topics("replies", partitions=2)
    asked = 0

    async def ask_more(count: int) -> None:
        nonlocal asked
        await ask(kafka, requests, range(asked, asked + count))
        asked += count

    async def work(member: Member, until: asyncio.Event) -> None:
        while not until.is_set():
            await asyncio.sleep(0.01)
            for record in await member.intake.take(5, 0.05):
                member.answer(record)
        await asyncio.wait(member.answering)

    async def help_out(member: Member, until: asyncio.Event) -> None:
        async with joined(member):
            await work(member, until)

    await ask_more(400)
    done, gone = asyncio.Event(), asyncio.Event()
    async with joined(Member(kafka, requests, replies)) as first:
        working = asyncio.create_task(work(first, done))
        others = [Member(kafka, requests, replies) for _ in range(3)]
        helping = [asyncio.create_task(help_out(member, gone)) for member in others]
        while not all(member.answering for member in others):  # they are quick: there has to be something left
            await ask_more(20)
            assert asked < 20_000
        gone.set()
        await asyncio.gather(*helping)
        await ask_more(100)
        await each_answered_once(kafka, replies, range(asked))
        done.set()
        await working
        await first.until_idle()
        assert len(first.intake.assigned) == 8
    await each_answered_once(kafka, replies, range(asked))


async def test_a_broker_that_comes_back_finds_the_answers_waiting() -> None:
    with KafkaCluster() as kafka:
        kafka.create_topic("requests", 1)
        kafka.create_topic("replies", 1)
        await ask(kafka, "requests", range(20))
        async with joined(Member(kafka, "requests", "replies")) as member:
            records = await member.take(20)
            await asyncio.gather(*map(member.answer, records[:5]))
            await asyncio.to_thread(kafka.kill_broker, 0)
            waiting = [member.answer(record) for record in records[5:]]
            await asyncio.sleep(1.0)
            await asyncio.to_thread(kafka.start_broker, 0)
            async with asyncio.timeout(60):
                while not all(task.done() and not task.cancelled() for task in waiting):
                    # those whose partition was read anew are answered anew
                    waiting += [member.answer(record) for record in await member.intake.take(20, 0.1)]
                    waiting = [task for task in waiting if not task.cancelled()]
            await member.until_idle()
        await each_answered_once(kafka, "replies", range(20))


async def test_a_broker_without_transactions_is_refused(kafka: KafkaCluster) -> None:
    refusal = r"--delivery exactly_once: .* has no real transactions"
    with EmbeddedBroker() as broker, pytest.raises(ConfigurationError, match=refusal):
        await require_transactions(connection(broker), topic="t", group_id="g", timeout=10.0)
    await require_transactions(connection(kafka), topic="t", group_id="g", timeout=10.0)
