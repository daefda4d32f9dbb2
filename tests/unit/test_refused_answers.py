"""What a front does with answers that are too large, and with those that nobody takes."""

from __future__ import annotations

import pytest
from aiokafka.errors import KafkaTimeoutError

from loramux_schemas import ErrorCode, KafkaConnection, ReplyRoute, Request
from loramux_worker.cancellations import Cancellations
from loramux_worker.errors import RequestFailed
from loramux_worker.front import Front
from loramux_worker.kafka.dead_letters import dead_letter
from loramux_worker.kafka.publisher import Publisher
from loramux_worker.kafka.records import OutgoingRecord, Record
from loramux_worker.kafka.sending import RecordRefused
from loramux_worker.look_ahead import Window
from loramux_worker.metrics import Metrics
from loramux_worker.replies import ReplyWriter, Topics
from loramux_worker.stopwatch import Stopwatch

LARGEST = 1_048_588


class Refusing:
    """A delivery to which nothing goes but what `takes` says."""

    def __init__(self, takes) -> None:
        self.takes = takes
        self.done: tuple[OutgoingRecord, ...] | None = None

    async def complete(self, record: Record, outgoing: tuple[OutgoingRecord, ...]) -> None:
        for answer in outgoing:
            if not self.takes(answer):
                raise RecordRefused(answer, "not taken")
        self.done = outgoing


def publisher() -> Publisher:
    publisher = Publisher(KafkaConnection(bootstrap_servers="127.0.0.1:1"))
    publisher._limits = dict.fromkeys(("lora.requests", "lora.replies", "dead"), LARGEST)
    return publisher


async def answered(record: Record, answers: tuple[OutgoingRecord, ...], delivery: Refusing) -> None:
    """Has a front deliver these answers."""

    async def answer(record: Record, watch: Stopwatch) -> tuple[OutgoingRecord, ...]:
        return answers

    await Front(None, answer, writer(), publisher(), delivery, Window(1, 0.5, 1, 1), Cancellations(60.0))._answer(
        record
    )


def writer() -> ReplyWriter:
    return ReplyWriter("worker", Topics("lora.replies", "lora.stream", "dead"), Metrics())


@pytest.mark.parametrize(
    ("key", "headers"), [(b"k" * 1_048_400, ()), (None, (("any", b"h" * 1_048_400),))], ids=["key", "header"]
)
async def test_a_dead_letter_of_any_size_is_delivered(
    key: bytes | None, headers: tuple[tuple[str, bytes], ...]
) -> None:
    record = Record("lora.requests", 0, 7, key, b"no request", headers, 0, 1)
    delivery = Refusing(publisher().fits)
    await answered(record, (dead_letter(record, "dead", "not JSON"),), delivery)
    (letter,) = delivery.done
    assert int.from_bytes(dict(letter.headers)["kafka_dlt-original-offset"]) == 7
    assert (letter.key, letter.value) == (None, None)


async def test_a_reply_whose_echo_is_too_large_comes_without() -> None:
    headers = (("correlation_id", b"h" * 1_048_300),)
    value = b'{"request_id":"r","prompt":"x"}'
    record = Record("lora.requests", 0, 7, None, value, headers, 0, 1)
    error = RequestFailed(ErrorCode.INVALID_REQUEST, "too much to echo")
    reply = writer().failed(Request.from_json(value), ReplyRoute.unrouted(headers), error, Stopwatch(0).timing(None))
    delivery = Refusing(publisher().fits)
    await answered(record, (reply,), delivery)
    (sent,) = delivery.done
    assert b'"request_id":"r"' in sent.value
    assert sent.headers == ()


async def test_a_refused_dead_letter_costs_no_reply_and_ends_where_nothing_goes() -> None:
    record = Record("lora.requests", 0, 7, None, b"no request", (), 0, 1)
    letter, reply = dead_letter(record, "dead", "not JSON"), OutgoingRecord("lora.replies", b"r", b"{}")
    delivery = Refusing(lambda answer: answer.topic != "dead")
    await answered(record, (letter, reply), delivery)
    assert delivery.done == (reply,)


async def test_a_publisher_is_well_again_when_a_topic_is_found() -> None:
    class Client:
        asked = 0

        async def partitions_for(self, topic: str) -> set[int]:
            self.asked += 1
            if self.asked == 1:
                raise KafkaTimeoutError("no metadata")
            return {0}

    some = publisher()
    some._producer._current = Client()
    await some.require_place(OutgoingRecord("lora.replies", b"key", b"value"))
    assert some.trouble is None
