"""What of the client needs no Kafka: correlation, timeouts, the order of deltas, requests from arguments."""

from __future__ import annotations

import asyncio
import itertools
import math
import time
import uuid
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_producer import Client, ClientClosed, ClientError, ReplyFailed, ReplyTimeout, new_request_id
from loramux_producer.deltas import DeltaBuffer
from loramux_producer.pending import PendingReplies, PendingReply
from loramux_producer.requests import RequestFields, build_request
from loramux_schemas import ErrorCode, KafkaConnection, Parameters, Reply, Request, StreamDelta


def a_request(request_id: str = "r1", **fields: Any) -> Request:
    return Request(request_id=request_id, prompt="Say it", **fields)


def echo(pending: PendingReply) -> list[tuple[str, bytes]]:
    return [("traceparent", b"00-1"), ("correlation_id", pending.correlation_id)]


def ok(request_id: str = "r1", text: str = "it") -> Reply:
    return Reply(request_id=request_id, generated_text=text, token_ids=(1,))


async def test_each_waiter_gets_its_own_reply_in_any_order() -> None:
    replies = PendingReplies()
    waiting = [replies.open(a_request(f"r{i}"), 60) for i in range(2000)]
    for pending in reversed(waiting):
        replies.take_reply(echo(pending), ok(pending.request.request_id).to_json())
    for pending in waiting:
        assert (await pending.future).request_id == pending.request.request_id
    await asyncio.sleep(0)  # the turn in which futures call back
    assert len(replies) == 0


async def test_two_requests_with_one_request_id_are_two() -> None:
    replies = PendingReplies()
    first, second = replies.open(a_request(), 60), replies.open(a_request(), 60)
    replies.take_reply(echo(second), ok(text="second").to_json())
    assert not first.future.done()
    replies.take_reply(echo(first), ok(text="first").to_json())
    assert (await first.future).generated_text == "first"
    assert (await second.future).generated_text == "second"


async def test_other_clients_records_are_passed_over_unparsed() -> None:
    ours, theirs = PendingReplies(), PendingReplies()
    waiting = ours.open(a_request(), 60)
    foreign = theirs.open(a_request(), 60)
    for headers in [echo(foreign), [], [("correlation_id", b"")], [("correlation_id", None)], [("other", b"x")]]:
        ours.take_reply(headers, b"\xff not JSON")
        ours.take_delta(headers, b"\xff not JSON")
    assert not waiting.future.done()
    assert len(ours) == len(theirs) == 1


async def test_second_and_late_replies_are_ignored() -> None:
    replies = PendingReplies()
    pending = replies.open(a_request(), 60)
    replies.take_reply(echo(pending), ok(text="first").to_json())
    # The second one comes before the loop has had a turn, the third one after.
    replies.take_reply(echo(pending), b"not JSON")
    assert (await pending.future).generated_text == "first"
    replies.take_reply(echo(pending), ok(text="third").to_json())
    assert pending.future.result().generated_text == "first"


async def test_a_timeout_is_one_requests_own() -> None:
    replies = PendingReplies()
    short, long, endless = (replies.open(a_request(), seconds) for seconds in (0.01, 60, math.inf))
    with pytest.raises(ReplyTimeout, match=r"request r1: no reply within 0\.01 s"):
        await short.future
    replies.take_reply(echo(short), ok().to_json())
    assert not long.future.done()
    assert not endless.future.done()
    assert len(replies) == 2


@pytest.mark.parametrize("timeout", [0, -1, math.nan])
async def test_a_timeout_must_be_positive(timeout: float) -> None:
    replies = PendingReplies()
    with pytest.raises(ValueError, match=r"timeout: .* is not a positive number"):
        replies.open(a_request(), timeout)
    assert len(replies) == 0


async def test_a_cancelled_waiter_is_forgotten() -> None:
    replies = PendingReplies()
    pending = replies.open(a_request(), 60)
    pending.future.cancel()
    replies.take_reply(echo(pending), ok().to_json())
    await asyncio.wait([pending.future])
    assert len(replies) == 0


async def test_error_replies_raise() -> None:
    replies = PendingReplies()
    pending = replies.open(a_request(), 60)
    reply = Reply.failure(ErrorCode.ADAPTER_UNAVAILABLE, "the store is away", request_id="r1")
    replies.take_reply(echo(pending), reply.to_json())
    with pytest.raises(ReplyFailed, match="adapter_unavailable: the store is away") as caught:
        await pending.future
    assert caught.value.reply == reply
    assert caught.value.code is ErrorCode.ADAPTER_UNAVAILABLE
    assert caught.value.retryable


@pytest.mark.parametrize("value", [b"", None, b"{", b"[]", b'{"request_id": 1}', b"\xff"])
async def test_an_unreadable_reply_to_us_fails_that_request_in_one_line(value: bytes | None) -> None:
    replies = PendingReplies()
    bad, good = replies.open(a_request(), 60), replies.open(a_request(), 60)
    replies.take_reply(echo(bad), value)
    with pytest.raises(ClientError, match="request r1: unreadable reply") as caught:
        await bad.future
    assert "\n" not in str(caught.value)
    assert not good.future.done()


async def test_fail_all_gives_each_waiter_its_own_error_with_the_cause() -> None:
    replies = PendingReplies()
    waiting = [replies.open(a_request(f"r{i}"), 60) for i in range(3)]
    cause = OSError("gone")
    replies.fail_all(lambda request_id: ClientClosed(f"{request_id} is over"), cause)
    errors = [pending.future.exception() for pending in waiting]
    assert [str(error) for error in errors] == ["r0 is over", "r1 is over", "r2 is over"]
    assert all(error is not None and error.__cause__ is cause for error in errors)
    await asyncio.wait([pending.future for pending in waiting])
    assert len(replies) == 0


async def test_deltas_go_to_the_request_that_streams() -> None:
    replies = PendingReplies()
    seen: list[StreamDelta] = []
    streaming, plain = replies.open(a_request(), 60, seen.append), replies.open(a_request(), 60)
    delta = StreamDelta(request_id="r1", index=0, text="it", token_ids=(1,))
    replies.take_delta(echo(plain), delta.to_json())
    replies.take_delta(echo(streaming), delta.to_json())
    assert seen == [delta]
    replies.take_reply(echo(streaming), ok().to_json())
    replies.take_delta(echo(streaming), delta.to_json())
    assert seen == [delta]


def deltas_of(texts: list[str]) -> list[StreamDelta]:
    return [StreamDelta(request_id="r1", index=i, text=text, token_ids=(i,)) for i, text in enumerate(texts)]


def drain(buffer: DeltaBuffer) -> list[StreamDelta]:
    return list(itertools.takewhile(lambda delta: delta is not None, iter(buffer.pop, None)))


@settings(deadline=None)
@given(st.data(), st.lists(st.text(max_size=4), max_size=12))
def test_deltas_come_out_in_order_once_and_complete(data: st.DataObject, texts: list[str]) -> None:
    """Whatever is read of the stream, in whatever order, when the final reply comes: the text is the reply's."""
    deltas = deltas_of(texts)
    read = data.draw(st.lists(st.sampled_from(deltas), max_size=30)) if deltas else []
    buffer = DeltaBuffer(a_request(stream=True))
    out: list[StreamDelta] = []
    for delta in read:
        buffer.push(delta)
        if data.draw(st.booleans()):
            out += drain(buffer)
    out += drain(buffer)
    reply = Reply(request_id="r1", generated_text="".join(texts), token_ids=tuple(range(len(texts))))
    rest = buffer.rest(reply)
    out += [] if rest is None else [rest]
    assert "".join(delta.text for delta in out) == reply.generated_text
    assert tuple(token for delta in out for token in delta.token_ids) == reply.token_ids
    assert [delta.index for delta in out] == list(range(len(out)))


def test_the_rest_leaves_out_the_prompt_of_a_full_text() -> None:
    buffer = DeltaBuffer(a_request(stream=True, parameters=Parameters(return_full_text=True)))
    buffer.push(deltas_of(["one"])[0])
    assert buffer.pop() is not None
    rest = buffer.rest(Reply(request_id="r1", generated_text="Say itone two", token_ids=(0, 1)))
    assert rest == StreamDelta(request_id="r1", index=1, text=" two", token_ids=(1,))


def test_no_rest_is_made_up() -> None:
    full_text = Parameters(return_full_text=True)
    of_tokens = Request(request_id="r1", prompt_token_ids=(1, 2), stream=True, parameters=full_text)
    assert DeltaBuffer(of_tokens).rest(Reply(request_id="r1", generated_text="who knows", token_ids=(1,))) is None
    buffer = DeltaBuffer(a_request(stream=True))
    buffer.push(deltas_of(["blue"])[0])
    assert buffer.pop() is not None
    assert buffer.rest(Reply(request_id="r1", generated_text="red", token_ids=(5,))) is None


def test_arguments_are_named_as_in_the_contract() -> None:
    parameters = set(RequestFields.__annotations__) - set(Request.model_fields)
    assert parameters == set(Parameters.model_fields)
    others = set(RequestFields.__annotations__) - parameters
    assert others == set(Request.model_fields) - {"prompt", "parameters"}


def test_a_request_from_arguments() -> None:
    request = build_request(
        adapter_id="acme/support@sha256:00",
        messages=[{"role": "user", "content": "Hi"}],
        stop=["\n"],
        temperature=1,
        priority=3,
        metadata={"tenant": 7},
    )
    assert request.adapter is not None
    assert request.adapter.adapter_id == "acme/support"
    assert request.messages is not None
    assert request.messages[0].content == "Hi"
    assert request.parameters == Parameters(stop=("\n",), temperature=1.0)
    assert (request.priority, request.metadata) == (3, {"tenant": 7})
    assert uuid.UUID(request.request_id).version == 7
    assert build_request("x", request_id="mine").request_id == "mine"


@pytest.mark.parametrize(
    ("prompt", "fields", "message"),
    [
        (None, {}, "prompt: one of prompt, messages and prompt_token_ids is required"),
        ("x", {"messages": [{"role": "user", "content": "Hi"}]}, "exactly one"),
        ("x", {"temprature": 1.0}, "parameters.temprature: unknown field .*did you mean temperature"),
        ("x", {"max_new_tokens": "5"}, "parameters.max_new_tokens: "),
        ("x", {"adapter_id": "../etc"}, "adapter_id: "),
        ("x", {"metadata": {"when": object()}}, "metadata: "),
        ("x", {"max_new_tokens": -1, "top_p": 7}, "parameters.*and 1 more"),
    ],
)
def test_what_breaks_the_contract_is_a_value_error_in_one_line(
    prompt: str | None, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build_request(prompt, **fields)
    assert "\n" not in str(caught.value)


def test_request_ids_are_uuid7_and_sort_by_time() -> None:
    before = time.time_ns() // 1_000_000
    ids = [uuid.UUID(new_request_id()) for _ in range(200)]
    after = time.time_ns() // 1_000_000
    assert len(set(ids)) == 200
    assert all(made.version == 7 and made.variant == uuid.RFC_4122 for made in ids)
    stamps = [made.int >> 80 for made in ids]
    assert stamps == sorted(stamps)
    assert before <= stamps[0] <= stamps[-1] <= after


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"bootstrap_servers": "nowhere"}, "bootstrap_servers: .*host:port"),
        ({"bootstrap_servers": "a:1", "connection": KafkaConnection()}, "bootstrap_servers: given together"),
        ({"shards_per_adapter": 0}, "shards_per_adapter"),
    ],
)
def test_wrong_settings_are_value_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Client(**arguments)


async def test_a_client_that_is_not_started_says_so() -> None:
    client = Client()
    with pytest.raises(ClientError, match="not started"):
        await client.generate("x")
    await client.close()
    with pytest.raises(ClientClosed):
        await client.generate("x")
    with pytest.raises(ClientError, match="started once"):
        await client.start()


async def test_no_broker_is_a_clear_error_at_once() -> None:
    with pytest.raises(ClientError, match=r"no Kafka broker answers at 127\.0\.0\.1:9") as caught:
        async with Client("127.0.0.1:9"):
            pass
    assert "\n" not in str(caught.value)
    assert asyncio.all_tasks() == {asyncio.current_task()}
