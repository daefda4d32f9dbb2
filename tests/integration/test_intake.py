"""Intake, publisher and delivery on a real broker: nothing lost, nothing read twice that need not be."""

from __future__ import annotations

import asyncio
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.errors import KafkaError
from confluent_kafka import TopicPartition as DeletePoint

from loramux_schemas import KafkaConnection
from loramux_worker.errors import ConfigurationError
from loramux_worker.kafka import consumer, intake, producer
from loramux_worker.kafka.commits import PlainCommits
from loramux_worker.kafka.delivery import AtLeastOnce
from loramux_worker.kafka.embedded import EmbeddedBroker
from loramux_worker.kafka.group_offsets import committed
from loramux_worker.kafka.intake import Intake
from loramux_worker.kafka.producer import PublisherClosed
from loramux_worker.kafka.publisher import Publisher
from loramux_worker.kafka.records import OutgoingRecord, Record
from loramux_worker.kafka.sending import RecordRefused
from loramux_worker.kafka.topics import ensure_topics
from loramux_worker.kafka.unpacking import MAX_UNPACKED_BYTES
from services.kafka import KafkaCluster
from services.process import free_port

pytestmark = pytest.mark.kafka

SECONDS = 30.0


class Worker:
    """An intake and what it told us."""

    def __init__(self, kafka: KafkaCluster | EmbeddedBroker, topic: str, **options: Any) -> None:
        self.lost: set[tuple[int, int]] = set()
        options = {"group_id": topic, "commit_interval": 0.1, **options}
        commits = PlainCommits(connection(kafka), topic=topic, group_id=options["group_id"])
        self.intake = Intake(connection(kafka), topic=topic, commits=commits, on_lost=self.lost.update, **options)

    async def take(self, count: int) -> list[Record]:
        """Exactly `count` records."""
        records: list[Record] = []
        async with asyncio.timeout(SECONDS):
            while len(records) < count:
                records += await self.intake.take(count - len(records), 1.0)
        return records

    async def take_nothing(self) -> None:
        assert await self.intake.take(100, 0.5) == []

    async def until(self, condition: Callable[[], bool]) -> None:
        """Polls, without wanting a record, until `condition` holds."""
        async with asyncio.timeout(SECONDS):
            while not condition():
                assert await self.intake.take(1, 0.05) == []

    async def until_assigned(self) -> None:
        """Waits for any partition, without reading."""
        async with asyncio.timeout(SECONDS):
            while not self.intake.assigned:
                assert await self.intake.take(0, 0.05) == []

    async def assigned(self, partitions: Iterable[int]) -> None:
        wanted = frozenset(partitions)
        async with asyncio.timeout(SECONDS):
            while self.intake.assigned != wanted:
                assert await self.intake.take(0, 0.05) == []


@asynccontextmanager
async def working(kafka: KafkaCluster | EmbeddedBroker, topic: str, **options: Any) -> AsyncIterator[Worker]:
    worker = Worker(kafka, topic, **options)
    await worker.intake.start()
    try:
        yield worker
    finally:
        await worker.intake.close()


@asynccontextmanager
async def publishing(kafka: KafkaCluster | EmbeddedBroker, *topics: str) -> AsyncIterator[Publisher]:
    publisher = Publisher(connection(kafka), topics=topics)
    await publisher.start()
    try:
        yield publisher
    finally:
        await publisher.close()


def connection(kafka: KafkaCluster | EmbeddedBroker) -> KafkaConnection:
    return KafkaConnection(bootstrap_servers=kafka.bootstrap_servers)


async def produce(
    kafka: KafkaCluster | EmbeddedBroker,
    topic: str,
    count: int,
    partition: int = 0,
    *,
    padding: int = 0,
    **options: Any,
) -> None:
    """Values b"0", b"1", … to one partition, each at the offset of its value in a fresh topic."""
    async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, **options) as producer:
        if "transactional_id" in options:
            async with producer.transaction():
                for i in range(count):
                    await producer.send(topic, b"%-*d" % (padding, i), partition=partition)
        else:
            for i in range(count):
                await producer.send(topic, b"%-*d" % (padding, i), partition=partition)


async def read_all(kafka: KafkaCluster | EmbeddedBroker, topic: str, count: int) -> list[Any]:
    """The first `count` committed records of a topic, in the order of each partition."""
    consumer = AIOKafkaConsumer(
        bootstrap_servers=kafka.bootstrap_servers,
        auto_offset_reset="earliest",
        isolation_level="read_committed",
        enable_auto_commit=False,
    )
    async with consumer, asyncio.timeout(SECONDS):
        partitions = (await consumer._client.fetch_all_metadata()).partitions_for_topic(topic)
        consumer.assign([TopicPartition(topic, number) for number in partitions])
        records: list[Any] = []
        while len(records) < count:
            for batch in (await consumer.getmany(timeout_ms=200)).values():
                records += batch
        return records


def offsets(records: Iterable[Record]) -> list[int]:
    return [record.offset for record in records]


async def test_a_restart_reads_again_exactly_what_was_not_answered(
    kafka: KafkaCluster, kafka_topics: Callable[..., str]
) -> None:
    topic = kafka_topics("requests")
    await produce(kafka, topic, 20)
    answered = {1, 3, 4, 7, 9}
    async with working(kafka, topic) as worker:
        records = await worker.take(10)
        assert offsets(records) == list(range(10))
        assert [record.value for record in records] == [b"%d" % i for i in range(10)]
        for record in reversed(records):
            if record.offset in answered:
                assert worker.intake.done(record)
        assert worker.intake.uncommitted() == {0: 5}
    # What was not taken comes after what was taken and not answered.
    async with working(kafka, topic) as worker:
        again = await worker.take(15)
        assert offsets(again) == [i for i in range(20) if i not in answered]
        for record in again:
            worker.intake.done(record)
    assert (await committed(connection(kafka), topic, topic, [0]))[0] == (20, "")
    async with working(kafka, topic) as worker:
        await worker.assigned([0])
        await worker.take_nothing()


async def test_rebalance_keeps_what_comes_back_and_reports_what_is_lost(
    kafka: KafkaCluster, kafka_topics: Callable[..., str]
) -> None:
    topic = kafka_topics("requests", partitions=4)
    for partition in range(4):
        await produce(kafka, topic, 10, partition)
    async with AsyncExitStack() as stack:
        # Nothing is committed in passing: what counts is what a rebalance and the end commit.
        first = await stack.enter_async_context(working(kafka, topic, commit_interval=600.0))
        records = await first.take(40)
        mine = {(record.partition, record.offset): record for record in records}
        for partition in range(4):  # offsets 0 and 2 are answered, the others in flight
            assert first.intake.done(mine[partition, 0])
            assert first.intake.done(mine[partition, 2])

        async with working(kafka, topic) as second:
            # `first` has to poll nothing for this, but must not read anything twice either.
            await asyncio.gather(first.until(lambda: len(first.intake.assigned) == 2), second.until_assigned())
            kept, gone = first.intake.assigned, second.intake.assigned
            assert kept | gone == {0, 1, 2, 3}
            assert first.lost == {(p, mine[p, 0].epoch) for p in gone}
            assert not first.intake.done(mine[min(gone), 5])
            assert not first.intake.holds(mine[min(gone), 5])

            # The second worker gets the unanswered ones of its partitions, and only those.
            theirs = await second.take(16)
            assert {p: offsets(r for r in theirs if r.partition == p) for p in gone} == {
                p: [1, 3, 4, 5, 6, 7, 8, 9] for p in gone
            }
            await second.take_nothing()
            for record in theirs:
                if record.offset < 9:
                    assert second.intake.done(record)

            # The first one goes on where it was.
            await first.take_nothing()
            for partition in kept:
                assert first.intake.done(mine[partition, 1])
                await produce(kafka, topic, 1, partition)
            assert sorted((r.partition, r.offset) for r in await first.take(2)) == [(p, 10) for p in sorted(kept)]

        # The second one has left: its partitions come to the first again, in a new epoch, with what is unanswered.
        back = await first.take(2)
        assert sorted((r.partition, r.offset) for r in back) == [(p, 9) for p in sorted(gone)]
        assert all(first.intake.done(record) for record in back)
        assert {r.epoch for r in back}.isdisjoint(record.epoch for record in records)
        assert first.lost == {(p, mine[p, 0].epoch) for p in gone}
        assert all(first.intake.done(mine[p, i]) for p in kept for i in range(3, 10))
    ends = await committed(connection(kafka), topic, topic, range(4))
    assert {p: ends[p] for p in gone} == dict.fromkeys(gone, (10, ""))
    assert {p: ends[p].position for p in kept} == dict.fromkeys(kept, 10)


async def test_a_full_window_stops_its_own_partition_only(
    kafka: KafkaCluster, kafka_topics: Callable[..., str]
) -> None:
    topic = kafka_topics("requests", partitions=2)
    for partition in range(2):
        await produce(kafka, topic, 100, partition)
    async with working(kafka, topic, window=16) as worker:
        taken = []
        for _ in range(116):  # all of partition 1 and a window of partition 0, whose head is not answered
            [record] = await worker.take(1)
            taken.append(record)
            if (record.partition, record.offset) != (0, 0):
                worker.intake.done(record)
        await worker.take_nothing()
        assert offsets(record for record in taken if record.partition == 0) == list(range(16))
        assert offsets(record for record in taken if record.partition == 1) == list(range(100))
        assert worker.intake.uncommitted() == {0: 15, 1: 0}
        await worker.until(lambda: worker.intake.lag() == {0: 100, 1: 0})
        [head] = [record for record in taken if (record.partition, record.offset) == (0, 0)]
        assert worker.intake.done(head)
        assert offsets(await worker.take(16)) == list(range(16, 32))


async def test_a_partition_that_is_not_wanted_now_waits_in_its_place(
    kafka: KafkaCluster, kafka_topics: Callable[..., str]
) -> None:
    topic = kafka_topics("requests", 2)
    for partition in (0, 1):
        await produce(kafka, topic, 5, partition)
    async with working(kafka, topic) as worker:
        await worker.assigned({0, 1})
        first = await worker.take(3)
        besides = {first[0].partition}
        others: list[Record] = []
        async with asyncio.timeout(SECONDS):
            while len([each for each in others if each.partition not in besides]) < 5:
                others += await worker.intake.take(100, 1.0, besides)
            assert {each.partition for each in others}.isdisjoint(besides)
            assert await worker.intake.take(100, 0.3, {0, 1}) == []
        rest = await worker.take(10 - len(first) - len(others))
    assert sorted((each.partition, each.offset) for each in first + others + rest) == [
        (partition, offset) for partition in (0, 1) for offset in range(5)
    ]


async def test_reads_no_more_than_it_is_asked_for(kafka: KafkaCluster, kafka_topics: Callable[..., str]) -> None:
    topic = kafka_topics("requests", partitions=3)
    for partition in range(3):
        await produce(kafka, topic, 50, partition)
    async with working(kafka, topic) as worker:
        seen = set()
        for _ in range(50):
            records = await worker.intake.take(3, 5.0)
            assert len(records) <= 3
            seen |= {(record.partition, record.offset) for record in records}
        rest = await worker.take(150 - len(seen))
        assert len(seen | {(record.partition, record.offset) for record in rest}) == 150


async def test_nothing_is_lost_when_take_is_cancelled(kafka: KafkaCluster, kafka_topics: Callable[..., str]) -> None:
    topic = kafka_topics("requests")
    async with working(kafka, topic) as worker:
        await worker.assigned([0])
        taken: list[int] = []
        for i in range(20):
            reading = asyncio.create_task(worker.intake.take(100, 5.0))
            await produce(kafka, topic, 1)
            if i % 2:
                reading.cancel()
            with suppress(asyncio.CancelledError):
                taken += offsets(await reading)
        taken += offsets(await worker.take(20 - len(taken)))
        assert taken == list(range(20))


async def test_lag_is_zero_behind_transaction_markers(kafka: KafkaCluster, kafka_topics: Callable[..., str]) -> None:
    topic = kafka_topics("requests")
    await produce(kafka, topic, 3, transactional_id=topic)  # offsets 0 to 2, the marker is offset 3
    async with working(kafka, topic) as worker:
        for record in await worker.take(3):
            worker.intake.done(record)
        await worker.until(lambda: worker.intake.lag() == {0: 0})
        assert (await committed(connection(kafka), topic, topic, [0]))[0] == (4, "")
        await produce(kafka, topic, 1, transactional_id=topic)
        [record] = await worker.take(1)
        assert record.offset == 4
        await worker.until(lambda: worker.intake.lag() == {0: 2})
        worker.intake.done(record)
        await worker.until(lambda: worker.intake.lag() == {0: 0})
    assert (await committed(connection(kafka), topic, topic, [0]))[0] == (6, "")


async def test_a_broker_restart_is_waited_for(kafka: KafkaCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "WATCH_SECONDS", 1.0)
    with KafkaCluster() as own:  # `kafka` is asked for only so that a missing Kafka is told once
        own.create_topic("requests", partitions=2)
        own.create_topic("replies")
        await produce(own, "requests", 10, 0)
        await produce(own, "requests", 10, 1)
        async with working(own, "requests") as worker, publishing(own, "replies") as publisher:
            delivery = AtLeastOnce(publisher, worker.intake)
            records = await worker.take(20)
            for record in records[:10]:
                await delivery.complete(record, [reply(record)])
            await asyncio.to_thread(own.kill_broker, 0)

            answering = [asyncio.create_task(delivery.complete(each, [reply(each)])) for each in records[10:15]]
            await worker.until(lambda: worker.intake.trouble is not None)
            assert not any(task.done() for task in answering)
            await asyncio.to_thread(own.start_broker, 0)
            async with asyncio.timeout(SECONDS):
                await asyncio.gather(*answering)
            for record in records[15:]:
                await delivery.complete(record, [reply(record)])

            await produce(own, "requests", 1, 0)
            [late] = await worker.take(1)
            assert (late.partition, late.offset) == (0, 10)
            assert worker.lost == set(), "it was away for less than the session timeout"
            await delivery.complete(late, [reply(late)])
            await worker.until(lambda: worker.intake.lag() == {0: 0, 1: 0})
            assert worker.intake.trouble is None
        sent = sorted((r.key, r.value) for r in await read_all(own, "replies", 21))
        assert sent == sorted((reply(r).key, reply(r).value) for r in [*records, late])
        ends = await committed(connection(own), "requests", "requests", [0, 1])
        assert ends == {0: (11, ""), 1: (10, "")}


async def test_requests_that_the_broker_deleted_unread_are_left_behind(
    kafka: KafkaCluster, kafka_topics: Callable[..., str]
) -> None:
    topic = kafka_topics("requests")
    await produce(kafka, topic, 30, padding=300_000)  # a fetch holds three of them
    async with working(kafka, topic, window=8) as worker:
        records = await worker.take(8)
        await worker.take_nothing()
        admin = kafka.admin()
        deleted = admin.delete_records([DeletePoint(topic, 0, 20)])
        await asyncio.to_thread(next(iter(deleted.values())).result, SECONDS)
        for record in records:
            assert worker.intake.done(record)
        rest: list[int] = []
        while not rest or rest[-1] < 29:
            [record] = await worker.take(1)
            rest.append(record.offset)
            worker.intake.done(record)
        fetched_before = len(rest) - 10
        assert rest == [*range(8, 8 + fetched_before), *range(20, 30)]
        assert fetched_before < 12
        assert worker.lost == set()
    assert (await committed(connection(kafka), topic, topic, [0]))[0] == (30, "")


async def test_a_commit_beyond_the_end_does_not_lose_what_is_there(
    kafka: KafkaCluster, kafka_topics: Callable[..., str]
) -> None:
    topic = kafka_topics("requests")
    await produce(kafka, topic, 3)
    options = {"bootstrap_servers": kafka.bootstrap_servers, "group_id": topic, "enable_auto_commit": False}
    async with AIOKafkaConsumer(**options) as consumer:  # as of a topic that was deleted and created anew
        consumer.assign([TopicPartition(topic, 0)])
        await consumer.commit({TopicPartition(topic, 0): (1000, "")})
    async with working(kafka, topic) as worker:
        records = await worker.take(3)
        assert offsets(records) == [0, 1, 2]
        assert len(worker.lost) == 1
        assert all(worker.intake.done(record) for record in records)
    assert (await committed(connection(kafka), topic, topic, [0]))[0] == (3, "")


async def test_a_header_name_that_is_not_utf8_stops_nobody(
    kafka: KafkaCluster, kafka_topics: Callable[..., str], kcat: str
) -> None:
    topic = kafka_topics("requests", partitions=2)
    await produce(kafka, topic, 3, 0)
    await produce(kafka, topic, 3, 1)
    odd = [kcat, "-q", "-b", kafka.bootstrap_servers, "-t", topic, "-p", "0", "-P", "-k", "key", "-z", "gzip"]
    command = [*odd, "-H", b"\xff\xfe=\xff"]
    await asyncio.to_thread(subprocess.run, command, input=b"odd\n", check=True, timeout=SECONDS)
    await produce(kafka, topic, 3, 0)
    await produce(kafka, topic, 1, 0, transactional_id=topic)
    async with working(kafka, topic) as worker:
        records = await worker.take(11)
        expected = [(0, i) for i in range(8)] + [(1, i) for i in range(3)]
        assert sorted((r.partition, r.offset) for r in records) == expected
        [read] = [record for record in records if (record.partition, record.offset) == (0, 3)]
        assert (read.key, read.value, read.headers) == (b"key", b"odd", (("\\xff\\xfe", b"\xff"),))
        for record in records:
            worker.intake.done(record)
        await worker.until(lambda: worker.intake.lag() == {0: 0, 1: 0})


async def test_a_batch_that_unpacks_to_too_much_stops_nobody(
    kafka: KafkaCluster, kafka_topics: Callable[..., str]
) -> None:
    topic = kafka_topics("requests", partitions=2)
    await produce(kafka, topic, 3, 0)
    options: dict[str, Any] = {"compression_type": "zstd", "max_request_size": 2 * MAX_UNPACKED_BYTES}
    async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, **options) as writer:
        await writer.send_and_wait(topic, bytes(MAX_UNPACKED_BYTES), partition=0)  # a kilobyte, to the broker
    await produce(kafka, topic, 3, 0)
    await produce(kafka, topic, 3, 1)
    async with working(kafka, topic) as worker:
        records = await worker.take(9)
        expected = [(0, i) for i in (0, 1, 2, 4, 5, 6)] + [(1, i) for i in range(3)]
        assert sorted((r.partition, r.offset) for r in records) == expected
        for record in records:
            worker.intake.done(record)
        await worker.until(lambda: worker.intake.lag() == {0: 0, 1: 0})


async def test_the_group_stays_together_when_two_begin_at_once(
    kafka: KafkaCluster, kafka_topics: Callable[..., str]
) -> None:
    topic = kafka_topics("requests", partitions=6)
    for partition in range(6):
        await produce(kafka, topic, 5, partition)
    async with working(kafka, topic) as first, working(kafka, topic) as second:
        answered: set[tuple[int, int]] = set()

        async def work(worker: Worker) -> None:
            while len(answered) < 30 or len(first.intake.assigned) != 3 or len(second.intake.assigned) != 3:
                records = await worker.intake.take(4, 0.2)
                answered.update((each.partition, each.offset) for each in records if worker.intake.done(each))

        async with asyncio.timeout(SECONDS):
            await asyncio.gather(work(first), work(second))
        assert first.intake.assigned.isdisjoint(second.intake.assigned)


async def test_who_slept_through_a_rebalance_does_not_answer_again(
    kafka: KafkaCluster, kafka_topics: Callable[..., str]
) -> None:
    topic = kafka_topics("requests")
    await produce(kafka, topic, 10)
    asleep, answered_elsewhere = threading.Event(), threading.Event()

    async def sleep_in_the_middle() -> tuple[list[Record], set[tuple[int, int]], list[Record]]:
        async with working(kafka, topic, session_timeout=1.5) as worker:
            before = await worker.take(5)
            asleep.set()
            answered_elsewhere.wait(SECONDS)  # blocks its whole event loop, as SIGSTOP would
            after: list[Record] = []
            while len(after) < 2:  # until it has noticed, it hands out what lies in its buffer
                after += [record for record in await worker.take(1) if record.epoch != before[0].epoch]
            assert not any(worker.intake.done(record) for record in before)
            assert all(worker.intake.done(record) for record in after)
            await worker.take_nothing()
            return before, worker.lost, after

    sleeper = asyncio.create_task(asyncio.to_thread(asyncio.run, sleep_in_the_middle()))
    await asyncio.to_thread(asleep.wait, SECONDS)
    async with working(kafka, topic, session_timeout=1.5) as heir:
        for record in await heir.take(10):
            if record.offset not in (4, 8):
                assert heir.intake.done(record)
    answered_elsewhere.set()
    before, lost, after = await sleeper
    assert lost == {(0, before[0].epoch)}
    assert offsets(after) == [4, 8]
    assert (await committed(connection(kafka), topic, topic, [0]))[0] == (10, "")


async def test_a_client_whose_background_task_died_is_replaced(
    kafka: KafkaCluster, kafka_topics: Callable[..., str]
) -> None:
    topic = kafka_topics("requests")
    await produce(kafka, topic, 5)
    async with working(kafka, topic) as worker:
        records = await worker.take(5)
        worker.intake.done(records[2])
        # What aiokafka raises from then on when its coordination or heartbeat task has ended with an error.
        broken = worker.intake._assignment.consumer
        broken._coordinator._pending_exception = KafkaError("Unexpected error during coordination")
        await worker.intake.take(1, 0.1)
        await worker.assigned([0])
        assert worker.intake._assignment.consumer is not broken
        await produce(kafka, topic, 1)
        assert offsets(await worker.take(1)) == [5]
        assert all(worker.intake.done(record) for record in records if record.offset != 2)
        assert worker.lost == set()
        assert worker.intake.trouble is None


async def test_replies_that_are_too_large_are_told_apart_and_harm_no_other(
    kafka: KafkaCluster, kafka_topics: Callable[..., str]
) -> None:
    topic = kafka_topics("replies", config={"max.message.bytes": "20000"})
    other = kafka_topics("other", config={"max.message.bytes": "20000"})
    async with publishing(kafka, topic) as publisher:
        assert publisher.fits(OutgoingRecord(topic, b"key", b"x" * 19_000))
        assert not publisher.fits(OutgoingRecord(topic, b"key", b"x" * 20_000))
        assert not publisher.fits(OutgoingRecord(topic, b"key", b"", (("name", b"x" * 20_000),)))
        await publisher.send([OutgoingRecord(topic, b"key", b"x" * 19_000)])

        # A topic whose limit nobody asked for: the broker says no, and the producer is as good as new afterwards.
        large, small = OutgoingRecord(other, b"large", b"x" * 30_000), OutgoingRecord(other, b"small", b"x")
        assert publisher.fits(large)
        async with asyncio.timeout(SECONDS):
            await publisher.send([small])
            with pytest.raises(RecordRefused, match="TooLarge"):
                await publisher.send([large, small])
            await publisher.send([small, OutgoingRecord(topic, b"again", b"x")])
        assert publisher.trouble is None
    assert [record.key for record in await read_all(kafka, topic, 2)] == [b"key", b"again"]
    assert [record.key for record in await read_all(kafka, other, 3)] == [b"small"] * 3


async def test_places_that_are_not_there_are_refused(kafka: KafkaCluster, kafka_topics: Callable[..., str]) -> None:
    topic = kafka_topics("replies", partitions=2)
    async with publishing(kafka, topic) as publisher:
        with pytest.raises(RecordRefused, match="no partition 2"):
            await publisher.send([OutgoingRecord(topic, None, b"x", partition=2)])
        with pytest.raises(RecordRefused, match="no such topic"):
            await publisher.send([OutgoingRecord("nobody-made-this", None, b"x")])
        await publisher.send([OutgoingRecord(topic, None, b"x", partition=1)])
    [record] = await read_all(kafka, topic, 1)
    assert record.partition == 1


async def test_deltas_keep_their_order_and_dead_letters_their_bytes(
    kafka: KafkaCluster, kafka_topics: Callable[..., str]
) -> None:
    stream, letters = kafka_topics("stream", partitions=3), kafka_topics("dead-letters")
    async with publishing(kafka, stream, letters) as publisher:
        for i in range(300):
            await publisher.send_soon(OutgoingRecord(stream, b"request-%d" % (i % 7), b"%d" % i))
        await publisher.send_soon(OutgoingRecord("nobody-made-this", b"key", b"lost"))
        odd = (("null", None), ("\xfc", b"\xff"), ("null", b""))
        await publisher.send([OutgoingRecord(letters, None, None, odd), OutgoingRecord(letters, b"", b"")])
    assert publisher.lost_deltas == 1
    records = await read_all(kafka, stream, 300)
    for key in {record.key for record in records}:
        numbers = [int(record.value) for record in records if record.key == key]
        assert numbers == sorted(numbers)
        assert len({record.partition for record in records if record.key == key}) == 1
    letter, empty = sorted(await read_all(kafka, letters, 2), key=lambda record: record.key is not None)
    assert (letter.key, letter.value, letter.headers) == (None, None, odd)
    assert (empty.key, empty.value) == (b"", b"")


async def test_missing_topics_are_created_or_named(kafka: KafkaCluster, kafka_topics: Callable[..., str]) -> None:
    there = kafka_topics("there")
    missing = f"{there}-missing"
    topics = {"--requests-topic": there, "--replies-topic": missing}
    options: dict[str, Any] = {"startup_timeout": 10.0, "partitions": 5}
    with pytest.raises(ConfigurationError, match=f"--replies-topic: .*'{missing}'.*--create-topics"):
        await ensure_topics(connection(kafka), topics, create=False, **options)
    with pytest.raises(ConfigurationError, match=f"--requests-topic: .*'{missing}'.*--create-topics"):
        await Worker(kafka, missing).intake.start()
    with pytest.raises(ConfigurationError, match="--stream-topic: cannot create topic 'not a name'"):
        await ensure_topics(connection(kafka), {"--stream-topic": "not a name"}, create=True, **options)
    try:
        await ensure_topics(connection(kafka), topics, create=True, **options)
        await ensure_topics(connection(kafka), topics, create=False, **options)
        assert len(kafka.admin().list_topics(missing, timeout=10.0).topics[missing].partitions) == 5
    finally:
        kafka.delete_topic(missing)


async def test_no_broker_is_an_error_that_names_the_setting() -> None:
    nobody = KafkaConnection(bootstrap_servers=f"127.0.0.1:{free_port()}")
    message = "--bootstrap-servers: no Kafka broker answered at 127.0.0.1:.* within 0.7 s"
    commits = PlainCommits(nobody, topic="t", group_id="g")
    with pytest.raises(ConfigurationError, match=message):
        await Intake(nobody, topic="t", group_id="g", commits=commits, on_lost=print, startup_timeout=0.7).start()
    with pytest.raises(ConfigurationError, match=message):
        await Publisher(nobody, startup_timeout=0.7).start()
    with pytest.raises(ConfigurationError, match=message):
        await ensure_topics(nobody, {"--requests-topic": "t"}, create=True, startup_timeout=0.7)


async def test_closing_while_the_broker_is_away_comes_to_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "WATCH_SECONDS", 0.5)
    for module in (consumer, producer):
        monkeypatch.setattr(module, "STOP_SECONDS", 1.0)
    with EmbeddedBroker() as broker:
        worker, publisher = Worker(broker, "requests"), Publisher(connection(broker))
        topics = {"--requests-topic": "requests", "--replies-topic": "replies"}
        await ensure_topics(connection(broker), topics, create=True, startup_timeout=10.0)
        await worker.intake.start()
        await publisher.start()
        await worker.until_assigned()
        await publisher.send([OutgoingRecord("replies", b"key", b"first")])
    sending = asyncio.create_task(publisher.send([OutgoingRecord("replies", b"key", b"second")]))
    await worker.until(lambda: worker.intake.trouble is not None)
    async with asyncio.timeout(SECONDS):
        await worker.intake.close()
        await publisher.close()
        with pytest.raises(PublisherClosed):
            await sending


async def test_the_embedded_broker_serves_a_worker() -> None:
    with EmbeddedBroker() as broker:
        quick = {"session_timeout": 3.0}  # how long it keeps a place for a member that has left
        reached = KafkaConnection(bootstrap_servers=broker.bootstrap_servers)
        topics = {"--requests-topic": "requests", "--replies-topic": "replies"}
        await ensure_topics(reached, topics, create=True, startup_timeout=10.0)
        async with working(broker, "requests", **quick) as worker, publishing(broker, "replies") as publisher:
            assert not publisher.fits(OutgoingRecord("replies", None, b"x" * 1_000_000))
            await produce(broker, "requests", 5, 2)
            delivery = AtLeastOnce(publisher, worker.intake)
            records = await worker.take(5)
            for record in records[1:]:
                await delivery.complete(record, [reply(record)])
        async with working(broker, "requests", **quick) as worker:
            assert offsets(await worker.take(1)) == [0]
            await worker.take_nothing()
        assert len(await read_all(broker, "replies", 4)) == 4


def reply(record: Record) -> OutgoingRecord:
    return OutgoingRecord(
        "replies", b"%d-%d" % (record.partition, record.offset), record.value, (("correlation_id", b"\x00"),)
    )
