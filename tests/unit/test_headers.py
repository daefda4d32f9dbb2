from __future__ import annotations

import struct

import pytest

from loramux_schemas import ReplyRoute, dead_letter_headers
from loramux_schemas.headers import MAX_ECHOED_BYTES


def test_no_headers_no_wishes() -> None:
    assert ReplyRoute.from_headers([]) == ReplyRoute(topic=None, partition=None, echo=())
    assert not ReplyRoute.from_headers([("other", b"x")]).has_correlation


def test_our_dialect() -> None:
    route = ReplyRoute.from_headers([("reply_to", b"answers"), ("correlation_id", b"\x00\xff"), ("x", b"y")])
    assert route == ReplyRoute(topic="answers", echo=(("correlation_id", b"\x00\xff"),))
    assert route.has_correlation


def test_springs_dialect() -> None:
    headers = [
        ("kafka_replyTopic", b"answers"),
        ("kafka_replyPartition", struct.pack(">i", 7)),
        ("kafka_correlationId", bytes(range(16))),
    ]
    route = ReplyRoute.from_headers(headers)
    assert route == ReplyRoute(topic="answers", partition=7, echo=(("kafka_correlationId", bytes(range(16))),))
    assert route.has_correlation


def test_a_trace_is_echoed_but_does_not_find_the_one_who_asked() -> None:
    route = ReplyRoute.from_headers([("traceparent", b"00-1-2-01")])
    assert route.echo == (("traceparent", b"00-1-2-01"),)
    assert not route.has_correlation


def test_echo_keeps_order_and_repetitions() -> None:
    headers = [("traceparent", b"t"), ("correlation_id", b""), ("correlation_id", b"2")]
    assert ReplyRoute.from_headers(headers).echo == tuple(headers)


def test_the_last_header_of_a_name_counts() -> None:
    assert ReplyRoute.from_headers([("reply_to", b"a"), ("reply_to", b"b")]).topic == "b"


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ([("reply_to", b"\xff")], "reply_to"),
        ([("reply_to", b"")], "reply_to"),
        ([("reply_to", b"..")], "reply_to"),
        ([("reply_to", b"a topic")], "reply_to"),
        ([("reply_to", b"a\n")], "reply_to"),
        ([("reply_to", b"a" * 250)], "reply_to"),
        ([("kafka_replyTopic", b"\xff")], "kafka_replyTopic"),
        ([("reply_to", b"a"), ("kafka_replyTopic", b"b")], "reply_to"),
        ([("kafka_replyPartition", b"1")], "kafka_replyPartition"),
        ([("kafka_replyPartition", struct.pack(">q", 1))], "kafka_replyPartition"),
        ([("kafka_replyPartition", struct.pack(">i", -1))], "kafka_replyPartition"),
    ],
)
def test_a_header_that_cannot_be_honoured_is_named(headers: list[tuple[str, bytes]], name: str) -> None:
    headers = [*headers, ("correlation_id", b"c")]
    with pytest.raises(ValueError, match=f"^{name}") as caught:
        ReplyRoute.from_headers(headers)
    assert str(caught.value).isprintable()
    assert ReplyRoute.unrouted(headers) == ReplyRoute(echo=(("correlation_id", b"c"),))


def test_headers_that_go_with_every_delta_are_bounded() -> None:
    longest = [("correlation_id", b"c" * (MAX_ECHOED_BYTES - len("correlation_id")))]
    assert ReplyRoute.from_headers(longest).echo == tuple(longest)
    for too_many in ([*longest, ("traceparent", b"")], [("correlation_id", b"c")] * 2000):
        with pytest.raises(ValueError, match=r"^correlation_id.*: more than 16384 bytes"):
            ReplyRoute.from_headers(too_many)
        assert ReplyRoute.unrouted(too_many).echo == tuple(too_many)  # the one who asked is still told
    unread = [("x-anything", bytes(1 << 20))]
    assert ReplyRoute.from_headers(unread) == ReplyRoute()


def test_a_header_without_a_value_is_as_good_as_absent() -> None:
    nothing = [("reply_to", None), ("correlation_id", None), ("kafka_replyPartition", None)]
    assert ReplyRoute.from_headers(nothing) == ReplyRoute()  # type: ignore[arg-type]


def test_dead_letter_headers_are_springs() -> None:
    assert dead_letter_headers("lora.requests", 3, 2**40, "not JSON\nat all") == [
        ("kafka_dlt-original-topic", b"lora.requests"),
        ("kafka_dlt-original-partition", struct.pack(">i", 3)),
        ("kafka_dlt-original-offset", struct.pack(">q", 2**40)),
        ("kafka_dlt-exception-message", b"not JSON\\nat all"),
    ]


def test_a_dead_letters_reason_is_bounded() -> None:
    headers = dict(dead_letter_headers("t", 0, 0, "x" * 100_000 + "\ud800"))
    assert len(headers["kafka_dlt-exception-message"]) < 1100
    assert dict(dead_letter_headers("t", 0, 0, "\ud800"))["kafka_dlt-exception-message"] == b"\\ud800"
