"""Intakes that share a group: what moves, what stays, and who has slept through it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest
from aiokafka.errors import KafkaError

from intake_rig import Worker, connection, offsets, produce, working
from loramux_worker.kafka.group_offsets import committed
from loramux_worker.kafka.records import Record
from services.kafka import KafkaCluster

pytestmark = pytest.mark.kafka

SECONDS = 30.0


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
