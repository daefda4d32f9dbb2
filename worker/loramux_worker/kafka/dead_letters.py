"""A message that cannot be read as a request, or that engines died of, kept for a person to look at."""

from __future__ import annotations

from loramux_schemas import dead_letter_headers
from loramux_worker.kafka.records import OutgoingRecord, Record


def dead_letter(record: Record, topic: str, reason: str) -> OutgoingRecord:
    """`record` for the dead-letter topic: key, value and headers as they came, then where it was and why."""
    where_and_why = dead_letter_headers(record.topic, record.partition, record.offset, reason)
    return OutgoingRecord(topic, record.key, record.value, (*record.headers, *where_and_why))
