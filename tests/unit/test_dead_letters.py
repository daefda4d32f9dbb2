"""A dead letter is the message as it came, plus where it was and why it is dead."""

from __future__ import annotations

from loramux_schemas import headers
from loramux_worker.kafka.dead_letters import dead_letter
from loramux_worker.kafka.records import Record


def record(**changes: object) -> Record:
    fields = {
        "topic": "lora.requests",
        "partition": 3,
        "offset": 2**40 + 1,
        "key": b"acme/support",
        "value": b"\xff not json",
        "headers": (("correlation_id", b"\x00\x01"), ("correlation_id", b"twice"), ("empty", b"")),
        "timestamp_ms": 1_700_000_000_000,
        "epoch": 1,
    }
    return Record(**{**fields, **changes})  # type: ignore[arg-type]


def test_key_value_and_headers_stay_as_they_were() -> None:
    letter = dead_letter(record(), "lora.dead-letters", "not JSON")
    assert (letter.topic, letter.key, letter.value) == ("lora.dead-letters", b"acme/support", b"\xff not json")
    assert letter.headers[:3] == record().headers
    assert letter.partition is None


def test_origin_and_reason_are_in_springs_formats() -> None:
    letter = dead_letter(record(), "lora.dead-letters", "no request_id ü")
    added = dict(letter.headers[3:])
    assert added == {
        headers.DEAD_LETTER_TOPIC: b"lora.requests",
        headers.DEAD_LETTER_PARTITION: (3).to_bytes(4, "big"),
        headers.DEAD_LETTER_OFFSET: (2**40 + 1).to_bytes(8, "big"),
        headers.DEAD_LETTER_MESSAGE: "no request_id ü".encode(),
    }


def test_a_message_without_key_value_and_headers() -> None:
    letter = dead_letter(record(key=None, value=None, headers=()), "lora.dead-letters", "empty")
    assert (letter.key, letter.value) == (None, None)
    assert len(letter.headers) == 4
