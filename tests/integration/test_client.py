"""The client on a real Kafka, answered by a stand-in for the worker."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from loramux_producer import (
    Client,
    ClientError,
    ReplyFailed,
    ReplyTimeout,
    shard_partitions,
)
from loramux_schemas import ErrorCode, Reply, Request
from services.kafka import KafkaCluster
from services.responder import Responder, Topics, answer_text, ok_reply

pytestmark = pytest.mark.kafka
SECONDS = 60.0


@pytest.fixture
def topics(kafka: KafkaCluster, kafka_topics: Callable[..., str]) -> Topics:
    names = kafka_topics("requests", partitions=6), kafka_topics("replies", partitions=3), kafka_topics("stream", 2)
    return Topics(kafka.bootstrap_servers, *names)


@pytest.fixture
async def responder(topics: Topics) -> AsyncIterator[Responder]:
    async with topics.responder() as responder:
        yield responder


@pytest.fixture
async def client(topics: Topics, responder: Responder) -> AsyncIterator[Client]:
    async with topics.client() as client:
        yield client


async def test_a_request_and_its_reply(client: Client, responder: Responder) -> None:
    reply = await client.generate(
        "hello", adapter_id="acme/support@sha256:00", max_new_tokens=3, metadata={"tenant": 7}, request_id="r1"
    )
    assert reply.generated_text == "acme/support@sha256:00 answers hello"
    assert (reply.request_id, reply.adapter_id, reply.metadata) == ("r1", "acme/support", {"tenant": 7})
    record = responder.records[0]
    # The replies topic is not the contract's default here, so the worker must be told.
    assert [name for name, _ in record.headers] == ["correlation_id", "reply_to"]
    assert record.headers[1][1].decode().startswith("replies-")
    assert record.key == b"acme/support@sha256:00"
    # A pin is no other adapter: it stays in the adapter's shards.
    assert record.partition in shard_partitions("acme/support", 6, 2)
    assert Request.from_json(record.value).parameters.max_new_tokens == 3


async def test_500_requests_over_two_clients_without_cross_talk(topics: Topics, responder: Responder) -> None:
    """Out of order, with duplicates, some of them errors, the same request ids on both sides."""

    async def ask(client: Client, side: str, i: int) -> None:
        adapter = None if i % 10 == 0 else f"acme/{i % 17}"
        wishes: dict[str, Any] = {"copies": 1 + i % 3, "side": side}
        if i % 11 == 0:
            wishes["error"] = "internal"
        asking = client.generate(f"{side} {i}", adapter_id=adapter, request_id=f"r{i}", metadata=wishes)
        if "error" in wishes:
            with pytest.raises(ReplyFailed) as caught:
                await asking
            reply = caught.value.reply
            assert caught.value.code is ErrorCode.INTERNAL
        else:
            reply = await asking
            assert reply.generated_text == f"{adapter or 'base'} answers {side} {i}"
        assert reply.request_id == f"r{i}"
        assert reply.metadata == wishes

    async with topics.client() as left, topics.client() as right:
        await asyncio.gather(
            *(ask(client, side, i) for i in range(250) for client, side in [(left, "left"), (right, "right")])
        )
    assert responder.asked == {f"r{i}": 2 for i in range(250)}
    for record in responder.records:
        request = Request.from_json(record.value)
        assert record.key == (request.adapter_id or "").encode()
        if request.adapter_id is not None:
            assert record.partition in shard_partitions(request.adapter_id, 6, 2)
    assert {record.partition for record in responder.records} == set(range(6))


async def test_submit_returns_when_kafka_has_the_request(client: Client, responder: Responder) -> None:
    futures = [await client.submit(f"prompt {i}", metadata={"reply": "held"}) for i in range(5)]
    await responder.wait_asked(5)
    assert not any(future.done() for future in futures)
    await responder.release()
    replies = await asyncio.gather(*futures)
    assert [reply.generated_text for reply in replies] == [f"base answers prompt {i}" for i in range(5)]


async def test_timeouts_and_late_replies(client: Client, responder: Responder) -> None:
    late = client.generate("late", timeout=0.5, request_id="r1", metadata={"reply": "held"})
    with pytest.raises(ReplyTimeout, match=r"request r1: no reply within 0\.5 s"):
        await late
    await responder.wait_asked(1)
    again = asyncio.create_task(client.generate("again", request_id="r1", metadata={"reply": "held"}))
    await responder.wait_asked(2)
    # The late reply to the first ask comes first, under the same request_id.
    await responder.release()
    assert (await again).generated_text == "base answers again"


async def test_a_reply_that_is_no_reply_fails_its_own_request(client: Client) -> None:
    bad = client.generate("x", metadata={"value": "not JSON"})
    good = client.generate("y")
    answers = await asyncio.gather(bad, good, return_exceptions=True)
    assert isinstance(answers[0], ClientError)
    assert "unreadable reply" in str(answers[0])
    assert isinstance(answers[1], Reply)


async def test_an_invalid_request_is_not_produced(client: Client, responder: Responder) -> None:
    with pytest.raises(ValueError, match=r"^parameters\.top_q: unknown field"):
        await client.generate("x", top_q=1)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="timeout: "):
        await client.generate("x", timeout=0)
    await client.generate("y")
    assert responder.asked.total() == 1


async def test_a_cancelled_caller_is_forgotten(client: Client, responder: Responder) -> None:
    asking = asyncio.create_task(client.generate("x", metadata={"reply": "held"}))
    await responder.wait_asked(1)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    await responder.release()
    assert (await client.generate("y")).generated_text == "base answers y"


@pytest.mark.parametrize("order", [None, "twice", "backwards"])
async def test_streaming(client: Client, responder: Responder, order: str | None) -> None:
    stream = client.stream("one two three", adapter_id="a", metadata={"deltas": order, "reply": "held"})
    deltas = [await anext(stream) for _ in range(5)]
    assert [delta.text for delta in deltas] == ["a", " answers", " one", " two", " three"]
    assert [delta.index for delta in deltas] == list(range(5))
    assert stream.reply is None
    await responder.release()
    assert [delta async for delta in stream] == []
    assert stream.reply is not None
    assert stream.reply.generated_text == "a answers one two three"
    assert stream.reply.request_id == stream.request.request_id == deltas[0].request_id


async def test_the_reply_may_overtake_the_deltas(client: Client) -> None:
    stream = client.stream("one two three", metadata={"reply": "first"})
    deltas = [delta async for delta in stream]
    assert "".join(delta.text for delta in deltas) == "base answers one two three"
    assert [token for delta in deltas for token in delta.token_ids] == list(range(5))
    assert stream.reply is not None


async def test_many_streams_at_once(topics: Topics, responder: Responder) -> None:
    async def read(client: Client, i: int) -> None:
        stream = client.stream(f"{i} " * (i % 7), adapter_id=f"a{i % 3}", metadata={"deltas": "twice"})
        text = "".join([delta.text async for delta in stream])
        assert text == answer_text(stream.request)
        assert stream.reply == ok_reply(stream.request)

    async with topics.client() as left, topics.client() as right:
        await asyncio.gather(*(read(client, i) for i in range(50) for client in (left, right)))


async def test_a_stream_that_fails_gives_its_deltas_first(client: Client, responder: Responder) -> None:
    stream = client.stream("one", metadata={"error": "internal", "reply": "held"})
    texts = [(await anext(stream)).text for _ in range(3)]
    await responder.release()
    with pytest.raises(ReplyFailed, match="internal"):
        await anext(stream)
    assert "".join(texts) == "base answers one"
    with pytest.raises(StopAsyncIteration):
        await anext(stream)


async def test_a_stream_that_is_left_early(client: Client, responder: Responder) -> None:
    stream = client.stream("one two", metadata={"reply": "held"})
    await anext(stream)
    await stream.aclose()
    assert [delta async for delta in stream] == []
    await responder.release()
    assert (await client.generate("y")).generated_text == "base answers y"
