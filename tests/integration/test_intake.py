"""Intake on a real broker: nothing lost, nothing read twice that need not be."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from confluent_kafka import TopicPartition as DeletePoint

from intake_rig import connection, offsets, produce, publishing, read_all, reply, working
from loramux_worker.kafka import intake
from loramux_worker.kafka.delivery import AtLeastOnce
from loramux_worker.kafka.group_offsets import committed
from loramux_worker.kafka.records import Record
from loramux_worker.kafka.unpacking import MAX_UNPACKED_BYTES
from services.kafka import KafkaCluster

pytestmark = pytest.mark.kafka

SECONDS = 30.0


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


async def test_a_request_of_an_aborted_transaction_was_never_asked(
    kafka: KafkaCluster, kafka_topics: Callable[..., str]
) -> None:
    topic = kafka_topics("requests")
    async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers, transactional_id=topic) as producer:
        await producer.begin_transaction()
        await producer.send_and_wait(topic, b"changed my mind", partition=0)
        await producer.abort_transaction()
    await produce(kafka, topic, 1)
    async with working(kafka, topic) as worker:
        [record] = await worker.take(1)
        assert record.value == b"0"
        worker.intake.done(record)
        await worker.until(lambda: worker.intake.lag() == {0: 0})


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
