"""Handing a record to aiokafka, and what it means when the cluster does not take it."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    InvalidTopicError,
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    TopicAuthorizationFailedError,
)

from loramux_worker.errors import LoramuxError
from loramux_worker.kafka.records import OutgoingRecord

# The broker will say the same again.
PERMANENT: Final = (
    MessageSizeTooLargeError,
    RecordListTooLargeError,
    InvalidTopicError,
    TopicAuthorizationFailedError,
)


class RecordRefused(LoramuxError):
    """The cluster does not take this record and will not take it later either."""

    def __init__(self, record: OutgoingRecord, reason: str) -> None:
        super().__init__(f"topic {record.topic}: {reason}")
        self.record = record
        self.reason = reason


async def enqueue(producer: AIOKafkaProducer, record: OutgoingRecord) -> asyncio.Future[Any]:
    """The future of the record's acknowledgement. Raises KafkaError when the record found no batch."""
    if record.key is None and record.value is None:
        # A tombstone without a key: Kafka takes it, aiokafka only in a batch of one's own.
        batch = producer.create_batch()
        batch.append(timestamp=None, key=None, value=None, headers=list(record.headers))
        partition = record.partition
        if partition is None:
            partition = min(await producer.partitions_for(record.topic))
        sending = producer.send_batch(batch, record.topic, partition=partition)
    else:
        sending = producer.send(
            record.topic,
            value=record.value,
            key=record.key,
            partition=record.partition,
            headers=list(record.headers),
        )
    acknowledgement: asyncio.Future[Any] = await sending
    return acknowledgement
