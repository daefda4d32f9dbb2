"""A running worker: requests that are cancelled in every state, and messages that come more than once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition

from loramux_producer import Client, ReplyFailed
from loramux_schemas import Cancellation, ErrorCode, Reply
from services.kafka import KafkaCluster
from services.serving import Serving, client_of, new_topics, worker_of
from tiny_models import TinyModel, make_model
from web_server import WebServer, serving

pytestmark = pytest.mark.kafka

SECONDS = 60.0
LOOK_AHEAD = 4
LONG = {"max_new_tokens": 480, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("model"), "llama", num_adapters=1)


@pytest.fixture(scope="module")
def web(model: TinyModel) -> Iterator[WebServer]:
    """The adapter under three names: one that is there, one that never arrives, one that is forbidden for now."""
    (adapter_id,) = model.adapter_ids
    with serving(WebServer()) as server:
        for name in ("quick", "stuck", "stuck-too", "forbidden"):
            for file in (model.adapters / adapter_id).iterdir():
                server.files[f"/{name}/{file.name}"] = file.read_bytes()
        server.stalls["/stuck/adapter_model.safetensors"] = 1000
        server.stalls["/stuck-too/adapter_model.safetensors"] = 1000
        server.denied.add("/forbidden/adapter_config.json")
        yield server


@pytest.fixture(scope="module")
def served(kafka: KafkaCluster, model: TinyModel, web: WebServer) -> Iterator[Serving]:
    """A worker that has four requests in hand, runs one, parks one, and finds cancellations from before its start."""
    topics = new_topics(kafka)
    asyncio.run(say_before_the_start(kafka, topics))
    bounds = {"look_ahead": LOOK_AHEAD, "max_parked": 1, "max_batch_sequences": 1}
    flags = {**bounds, "adapter_uri": f"{web.url}/{{adapter_id}}"}
    with worker_of(kafka, model, topics, **flags) as worker:
        yield Serving(kafka, worker, model, topics)


async def say_before_the_start(kafka: KafkaCluster, topics: dict[str, str]) -> None:
    async with client_of(kafka, topics) as client:
        await client.cancel("cancelled-before-the-start")
    async with AIOKafkaProducer(bootstrap_servers=kafka.bootstrap_servers) as producer:
        long_ago = int((time.time() - 3600) * 1000)
        old = Cancellation.of("cancelled-long-ago").to_json()
        await producer.send_and_wait(topics["control_topic"], old, timestamp_ms=long_ago, partition=1)


async def test_what_was_cancelled_before_the_worker_started(served: Serving) -> None:
    async with served.client() as client:
        with pytest.raises(ReplyFailed) as failed:
            await client.generate("x", request_id="cancelled-before-the-start")
        assert (failed.value.code, failed.value.retryable) == (ErrorCode.CANCELLED, False)
        assert (await client.generate("x", request_id="cancelled-long-ago", max_new_tokens=2)).status == "ok"


async def test_a_request_is_cancelled_in_every_state(served: Serving) -> None:
    """Streaming, waiting for the batch or an adapter, parked, unread in Kafka: one reply each, and room again."""
    async with served.client() as client, served.client() as other, reading(served, "replies_topic") as replies:
        stream = client.stream("streaming", **LONG)
        deltas = [await anext(stream)]
        behind = await client.submit("x", adapter_id="quick", **LONG)
        ids = [stream.request.request_id, client_id(client, behind)]
        await asyncio.gather(*map(client.cancel, ids))
        with pytest.raises(ReplyFailed) as failed:
            deltas += [delta async for delta in stream]
        assert len(deltas) < LONG["max_new_tokens"], "it was cut short"

        # every seat is held by a request whose adapter never comes
        taken = [await client.submit("x", adapter_id=name) for name in ("stuck", "stuck", "stuck-too", "stuck-too")]
        parked = await client.submit("never begun before it was cancelled")
        await metric_is(served, "loramux_requests_parked", 1)
        unread = await client.submit("never read before it was cancelled")
        waiting = [*taken, parked, unread]
        ids += [client_id(client, future) for future in waiting]
        await other.cancel(ids[-1])  # by a client that never asked it
        assert not unread.done()
        await client.cancel(ids[-2])
        _, waits_for_a_seat = await asyncio.wait([parked, unread], timeout=SECONDS)
        assert not waits_for_a_seat
        assert not any(future.done() for future in taken)
        await asyncio.gather(*map(client.cancel, ids[:-2]))
        outcomes = await asyncio.gather(behind, *waiting, return_exceptions=True)
        errors = [failed.value, *outcomes]
        assert [error.code for error in errors] == [ErrorCode.CANCELLED] * 8
        after = [await client.generate("after", max_new_tokens=4) for _ in range(LOOK_AHEAD)]
        assert all(reply.status == "ok" for reply in after)
        counts = Counter(reply.request_id for reply in await parsed(replies, 8 + LOOK_AHEAD))
    assert [counts[request_id] for request_id in ids] == [1] * 8

    async with served.client() as client:
        answered = await client.generate("answered", max_new_tokens=2)
        await client.cancel(answered.request_id)  # too late: nothing happens
        assert (await client.generate("next", max_new_tokens=2)).status == "ok"
    await metric_is(served, "loramux_requests_running", 0)  # the engine says it some times a second


async def metric_is(served: Serving, name: str, value: float) -> None:
    async with asyncio.timeout(SECONDS):
        while await asyncio.to_thread(served.worker.metric, name) != value:  # noqa: ASYNC110 - another process's
            await asyncio.sleep(0.02)


def client_id(client: Client, future: asyncio.Future[Reply]) -> str:
    """The request_id of a request that waits."""
    return next(p.request.request_id for p in client._pending._waiting.values() if p.future is future)


async def test_a_message_that_comes_again_is_answered_from_the_first(served: Serving) -> None:
    """While the first runs and when it is answered; streamed requests get the final reply alone."""
    copies_before = served.worker.metric("loramux_duplicates_total")
    value = request("again", stream=True, parameters={"max_new_tokens": 100, "ignore_eos": True, "do_sample": True})
    other = request("again", parameters={"max_new_tokens": 3})
    async with (
        AIOKafkaProducer(bootstrap_servers=served.kafka.bootstrap_servers) as producer,
        reading(served, "replies_topic") as replies,
        reading(served, "stream_topic") as deltas,
    ):

        async def ask(message: bytes, name: str, partition: int = 0) -> None:
            headers = [("correlation_id", name.encode()), ("reply_to", served.topics["replies_topic"].encode())]
            await producer.send_and_wait(served.topics["requests_topic"], message, partition=partition, headers=headers)

        for name in ("first", "beside"):
            await ask(value, name)
        found = await take(replies, 2)
        await ask(value, "later")
        await ask(other, "other content")
        await ask(value, "other partition", partition=1)
        found += await take(replies, 3)
        streamed = [dict(record.headers)["correlation_id"] for record in await take_all(deltas)]
    by_name = {dict(record.headers)["correlation_id"].decode(): record for record in found}
    assert set(by_name) == {"first", "beside", "later", "other content", "other partition"}
    assert all(record.key == b"again" for record in found)
    texts = {name: Reply.from_json(record.value).generated_text for name, record in by_name.items()}
    assert by_name["first"].value == by_name["beside"].value == by_name["later"].value
    assert len(Reply.from_json(by_name["other content"].value).token_ids) == 3
    assert texts["other partition"] != texts["first"], "run again: it is sampled without a seed"
    assert set(streamed) == {b"first", b"other partition"}
    assert served.worker.metric("loramux_duplicates_total") - copies_before == 2


async def test_an_error_that_may_pass_is_tried_again(served: Serving, web: WebServer) -> None:
    value = request("retried", adapter_id="forbidden", parameters={"max_new_tokens": 2})
    wrong = request("refused", adapter_id="nobody/has-this")
    async with (
        AIOKafkaProducer(bootstrap_servers=served.kafka.bootstrap_servers) as producer,
        reading(served, "replies_topic") as replies,
    ):

        async def ask(message: bytes) -> Reply:
            await producer.send_and_wait(served.topics["requests_topic"], message, partition=2)
            (reply,) = await parsed(replies, 1)
            return reply

        assert (await ask(value)).error.code == ErrorCode.ADAPTER_UNAVAILABLE
        web.denied.clear()
        until = time.monotonic() + SECONDS
        while (reply := await ask(value)).status != "ok":
            assert time.monotonic() < until, reply
            assert reply.error.code == ErrorCode.ADAPTER_UNAVAILABLE  # a store's failure is remembered for a moment
            await asyncio.sleep(0.2)
        assert (await ask(value)) == reply
        assert (await ask(wrong)).error.code == ErrorCode.ADAPTER_NOT_FOUND
        assert (await ask(wrong)).error.code == ErrorCode.ADAPTER_NOT_FOUND


def request(name: str, **fields: Any) -> bytes:
    return json.dumps({"request_id": name, "prompt": "Once", **fields}).encode()


@contextlib.asynccontextmanager
async def reading(served: Serving, topic: str) -> AsyncIterator[AIOKafkaConsumer]:
    """A consumer that stands at the end of one of the worker's topics."""
    name = served.topics[topic]
    servers = served.kafka.bootstrap_servers
    async with AIOKafkaConsumer(bootstrap_servers=servers, isolation_level="read_committed") as consumer:
        described = served.kafka.admin().list_topics(name).topics[name]
        partitions = [TopicPartition(name, number) for number in described.partitions]
        consumer.assign(partitions)
        await consumer.seek_to_end(*partitions)
        for partition in partitions:
            await consumer.position(partition)
        yield consumer


async def take(consumer: AIOKafkaConsumer, count: int) -> list[Any]:
    """The next `count` records, and no more than those."""
    records: list[Any] = []
    async with asyncio.timeout(SECONDS):
        while len(records) < count:
            for batch in (await consumer.getmany(timeout_ms=200, max_records=count - len(records))).values():
                records += batch
    return records


async def take_all(consumer: AIOKafkaConsumer) -> list[Any]:
    """Everything up to the end."""
    ends = await consumer.end_offsets(list(consumer.assignment()))
    records: list[Any] = []
    async with asyncio.timeout(SECONDS):
        while any([await consumer.position(partition) < end for partition, end in ends.items()]):
            for batch in (await consumer.getmany(timeout_ms=200)).values():
                records += batch
    return records


async def parsed(consumer: AIOKafkaConsumer, count: int) -> list[Reply]:
    return [Reply.from_json(record.value) for record in await take(consumer, count)]
