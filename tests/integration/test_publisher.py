"""The publisher on a real broker: sizes, places, order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from intake_rig import publishing, read_all
from loramux_worker.kafka.records import OutgoingRecord
from loramux_worker.kafka.sending import RecordRefused
from services.kafka import KafkaCluster

pytestmark = pytest.mark.kafka

SECONDS = 30.0


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


async def test_places_that_have_gone_are_found(kafka: KafkaCluster, kafka_topics: Callable[..., str]) -> None:
    own, private = kafka_topics("replies"), kafka_topics("private")
    there = [OutgoingRecord(private, None, b"x"), OutgoingRecord(private, None, b"x", partition=0)]
    gone = [OutgoingRecord(private, None, b"x", partition=1), OutgoingRecord("nobody-made-this", b"k", b"x")]
    waited_for = OutgoingRecord(own, None, b"x", partition=1)
    async with publishing(kafka, own) as publisher:
        assert await publisher.without_place([*there, waited_for, *gone]) == gone
        assert await publisher.without_place([waited_for]) == []


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
