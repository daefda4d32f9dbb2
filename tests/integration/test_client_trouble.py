"""The client on a real Kafka in which things go wrong, or change while it runs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
from aiokafka import AIOKafkaProducer
from confluent_kafka.admin import NewPartitions

from loramux_producer import Client, ClientClosed, ClientError, ReplyTimeout, RequestTooLarge
from loramux_schemas import Reply, Request
from services.kafka import KafkaCluster
from services.responder import Topics

pytestmark = pytest.mark.kafka
SECONDS = 60.0


@pytest.fixture
def topics(kafka: KafkaCluster, kafka_topics: Callable[..., str]) -> Topics:
    names = kafka_topics("requests", partitions=6), kafka_topics("replies", partitions=3), kafka_topics("stream", 2)
    return Topics(kafka.bootstrap_servers, *names)


async def test_close_fails_who_waits_and_leaves_nothing_behind(topics: Topics) -> None:
    before = asyncio.all_tasks()
    client = topics.client()
    await client.start()
    futures = [await client.submit(f"{i}") for i in range(50)]
    waiting = [asyncio.create_task(client.generate(f"{i}")) for i in range(50)]
    streaming = asyncio.create_task(anext(client.stream("streamed")))
    await asyncio.sleep(0)  # these have begun to produce
    started = time.monotonic()
    await client.close()
    assert time.monotonic() - started < 5
    outcomes = await asyncio.gather(*futures, *waiting, streaming, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {ClientClosed}
    assert {str(outcome).split(": ")[1] for outcome in outcomes} == {"the client was closed before it was answered"}
    with pytest.raises(ClientClosed):
        await client.generate("z")
    await client.close()
    assert asyncio.all_tasks() == before


async def test_a_missing_stream_topic_fails_streams_only(topics: Topics) -> None:
    client = Client(topics.servers, requests_topic=topics.requests, replies_topic=topics.replies, stream_topic="absent")
    async with topics.responder() as responder, client:
        for _ in range(2):
            with pytest.raises(ClientError, match="topic absent does not exist"):
                await anext(client.stream("x"))
        assert (await client.generate("x")).status == "ok"
        assert responder.asked.total() == 1


@pytest.mark.parametrize("missing", ["requests_topic", "replies_topic"])
async def test_a_missing_topic_is_an_error_at_start(topics: Topics, missing: str) -> None:
    before = asyncio.all_tasks()
    names = {"requests_topic": topics.requests, "replies_topic": topics.replies, missing: "absent"}
    started = time.monotonic()
    with pytest.raises(ClientError, match="topic absent does not exist"):
        await Client(topics.servers, **names).start()
    assert time.monotonic() - started < 10
    assert asyncio.all_tasks() == before


async def test_replies_of_aborted_transactions_are_not_seen(topics: Topics) -> None:
    producer = AIOKafkaProducer(bootstrap_servers=topics.servers, transactional_id=topics.replies)
    await producer.start()
    try:
        async with topics.client() as client, topics.responder() as responder:
            future = await client.submit("x", request_id="r1", metadata={"silent": True})
            await responder.wait_asked(1)
            headers = list(responder.records[0].headers)

            async def reply_with(text: str) -> None:
                value = Reply(request_id="r1", generated_text=text).to_json()
                await producer.send_and_wait(topics.replies, value, partition=0, headers=headers)

            await producer.begin_transaction()
            await reply_with("never committed")
            await producer.abort_transaction()
            async with producer.transaction():
                await reply_with("committed")
            assert (await future).generated_text == "committed"
    finally:
        await producer.stop()


async def test_replies_on_partitions_added_later_are_read(kafka: KafkaCluster, topics: Topics) -> None:
    async with topics.client(metadata_max_age=0.2) as client, topics.responder() as responder:
        on_old = await client.submit("x", request_id="old", metadata={"silent": True})
        on_new = await client.submit("x", request_id="new", metadata={"silent": True})
        await responder.wait_asked(2)
        headers = {Request.from_json(r.value).request_id: list(r.headers) for r in responder.records}
        admin = kafka.admin()
        growing = admin.create_partitions([NewPartitions(topics.replies, 5)])
        await asyncio.to_thread(growing[topics.replies].result, SECONDS)
        producer = AIOKafkaProducer(bootstrap_servers=topics.servers)
        await producer.start()
        try:
            while len(await producer.partitions_for(topics.replies)) < 5:
                await producer.client.force_metadata_update()
            for request_id, partition in [("new", 4), ("old", 0)]:
                value = Reply(request_id=request_id, generated_text=request_id).to_json()
                await producer.send_and_wait(topics.replies, value, partition=partition, headers=headers[request_id])
        finally:
            await producer.stop()
        assert (await on_new).generated_text == "new"
        assert (await on_old).generated_text == "old"


async def test_a_request_that_is_too_large_spoils_nothing(
    kafka: KafkaCluster, kafka_topics: Callable[..., str]
) -> None:
    """A broker's refusal leaves a hole in the sequence numbers of aiokafka's idempotent producer."""
    small = kafka_topics("requests", config={"max.message.bytes": "20000"})
    topics = Topics(kafka.bootstrap_servers, small, kafka_topics("replies"), kafka_topics("stream"))
    async with topics.responder() as responder, topics.client() as client:
        for round_number in range(3):
            good = [client.generate(f"{round_number} {i}") for i in range(20)]
            with pytest.raises(RequestTooLarge, match=r"raise its max\.message\.bytes"):
                await client.generate("x" * 50_000)
            assert len(await asyncio.gather(*good)) == 20
            good = [client.generate(f"{round_number} {i}") for i in range(20)]
            bad = [client.generate("x" * 50_000) for _ in range(3)]
            outcomes = await asyncio.gather(*good[:10], *bad, *good[10:], return_exceptions=True)
            assert sum(isinstance(outcome, RequestTooLarge) for outcome in outcomes) == 3
            assert sum(isinstance(outcome, Reply) for outcome in outcomes) == 20
        with pytest.raises(RequestTooLarge, match="more than the client sends"):
            await client.generate("x" * 2_000_000)
        assert responder.asked.total() == 120


async def test_waiters_fail_with_the_cause_when_reading_ends(topics: Topics) -> None:
    async with topics.client() as client:
        waiting = [await client.submit("x", metadata={"silent": True}) for _ in range(3)]
        # aiokafka itself says nothing when its fetching ends: its consumer just never returns a record again.
        client._replies._consumer._fetcher._fetch_task.cancel()
        outcomes = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), SECONDS)
        assert all(type(outcome) is ClientError for outcome in outcomes)
        assert "fetching ended unexpectedly" in str(outcomes[0])
        assert isinstance(outcomes[0], ClientError)
        assert outcomes[0].__cause__ is not None
        with pytest.raises(ClientError, match="make a new client"):
            await client.generate("y")


async def test_a_broker_that_goes_away_loses_no_waiter() -> None:
    with KafkaCluster() as kafka:
        topics = Topics(kafka.bootstrap_servers, "lora.requests", "lora.replies", "lora.stream")
        for topic in (topics.requests, topics.replies, topics.stream):
            kafka.create_topic(topic, 2)
        before = asyncio.all_tasks()
        async with topics.client() as client:
            early = [await client.submit(f"early {i}") for i in range(10)]
            await asyncio.to_thread(kafka.kill_broker, 0)
            # Produced into the void: it waits, as Kafka's clients do, for the broker to come back.
            during = asyncio.create_task(client.generate("during"))
            with pytest.raises(ReplyTimeout):
                await client.generate("impatient", timeout=0.5)
            await asyncio.to_thread(kafka.start_broker, 0)
            async with topics.responder() as responder:
                replies = await asyncio.gather(*early, during)
            assert all([name for name, _ in record.headers] == ["correlation_id"] for record in responder.records)
            assert [reply.generated_text for reply in replies[:10]] == [f"base answers early {i}" for i in range(10)]
            assert replies[10].generated_text == "base answers during"

            await asyncio.to_thread(kafka.kill_broker, 0)
            lost = asyncio.create_task(client.generate("lost"))
            with pytest.raises(ReplyTimeout):
                await client.generate("impatient", timeout=0.5)
            started = time.monotonic()
        assert time.monotonic() - started < 15
        with pytest.raises(ClientClosed):
            await lost
        assert asyncio.all_tasks() == before


async def test_requests_and_streams_outlive_brokers_that_are_killed() -> None:
    """One broker killed twice, under requests and streams that are asked, half answered, or asked meanwhile."""
    with KafkaCluster() as kafka:
        topics = Topics(kafka.bootstrap_servers, "lora.requests", "lora.replies", "lora.stream")
        for topic in (topics.requests, topics.replies, topics.stream):
            kafka.create_topic(topic, 2)

        async def streamed(client: Client, number: int) -> str:
            stream = client.stream(f"stream {number}", metadata={"reply": "held"} if number % 2 else None)
            return "".join([delta.text async for delta in stream])

        async with topics.client(timeout=4 * SECONDS) as client:
            asking: list[asyncio.Task[Reply]] = []
            streams: list[asyncio.Task[str]] = []
            for outage in range(2):
                first = len(asking)
                asking += [asyncio.create_task(client.generate(f"{first + i}")) for i in range(40)]
                streams += [asyncio.create_task(streamed(client, len(streams) + i)) for i in range(20)]
                async with topics.responder() as responder:
                    responder.limit = 30 + outage * 70  # what is beyond waits for the next one
                    await asyncio.wait_for(responder.wait_asked(40 + outage * 70), SECONDS)
                await asyncio.to_thread(kafka.kill_broker, 0)
                asking += [asyncio.create_task(client.generate(f"{first + 40 + i}")) for i in range(10)]
                await asyncio.to_thread(kafka.start_broker, 0)
            # Begins at the beginning: the client has to make nothing of what it has already.
            async with topics.responder() as responder:
                await asyncio.wait_for(responder.wait_asked(140), 3 * SECONDS)
                async with asyncio.timeout(SECONDS):
                    while not all(stream.done() for stream in streams):
                        await responder.release()
                        await asyncio.sleep(0.1)
                texts = [reply.generated_text for reply in await asyncio.wait_for(asyncio.gather(*asking), SECONDS)]
                assert texts == [f"base answers {i}" for i in range(100)]
                texts = await asyncio.wait_for(asyncio.gather(*streams), SECONDS)
                assert texts == [f"base answers stream {i}" for i in range(40)]
                assert set(responder.asked.values()) == {1}


async def test_a_client_starts_once(topics: Topics) -> None:
    async with topics.client() as client:
        with pytest.raises(ClientError, match="started once"):
            await client.start()
