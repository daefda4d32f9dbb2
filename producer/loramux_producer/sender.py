"""Produces records: acknowledged by all replicas, idempotent, not spoiled by one record that is refused."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from aiokafka import AIOKafkaProducer
from aiokafka.errors import (
    InvalidProducerIdMapping,
    KafkaError,
    MessageSizeTooLargeError,
    OutOfOrderSequenceNumber,
    ProducerClosed,
    ProducerFenced,
    RecordListTooLargeError,
    UnknownProducerId,
)
from aiokafka.structs import RecordMetadata

from loramux_producer.errors import ClientError, RequestTooLarge

log = logging.getLogger(__name__)

FLUSH_SECONDS = 3.0
ATTEMPTS = 3

TOO_LARGE = (MessageSizeTooLargeError, RecordListTooLargeError)
# The broker did not append the record and will not append what comes after it from the same producer.
SPOILED = (
    InvalidProducerIdMapping,
    OutOfOrderSequenceNumber,
    ProducerClosed,
    ProducerFenced,
    UnknownProducerId,
)


class RequestSender:
    """One topic's producer, made anew when the broker has refused a record.

    A refused record leaves a hole in an idempotent producer's sequence numbers: every later record of that
    partition would be refused too. `options` are keyword arguments of an aiokafka client.
    """

    def __init__(self, topic: str, options: Mapping[str, Any]) -> None:
        self.topic = topic
        self._options = options
        self._producer: AIOKafkaProducer | None = None
        self._replacing = asyncio.Lock()
        self._retiring: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Connect. Raises KafkaError."""
        self._producer = await self._connect()

    async def num_partitions(self) -> int:
        """How many partitions the topic has, as far as known now. Raises ClientError."""
        try:
            return len(await self._current().partitions_for(self.topic))
        except KafkaError as error:
            raise ClientError(f"topic {self.topic}: its partitions are not known: {error}") from error

    async def send(
        self, *, partition: int | None, key: bytes, value: bytes, headers: Sequence[tuple[str, bytes]]
    ) -> RecordMetadata:
        """Produce one record; returns when the broker has it. While no broker answers it waits.

        Without a partition the key chooses it.

        Raises RequestTooLarge, or ClientError for anything else that the broker refuses.
        """
        for _ in range(ATTEMPTS):
            producer = self._current()
            try:
                acknowledged = await producer.send(
                    self.topic, value, key=key, partition=partition, headers=list(headers)
                )
            except TOO_LARGE as error:
                raise RequestTooLarge(f"a request of {len(value)} bytes is more than the client sends") from error
            except SPOILED as error:
                await self._replace(producer, error)
                continue
            except KafkaError as error:
                raise ClientError(f"topic {self.topic}: {error}") from error
            try:
                return await acknowledged
            except TOO_LARGE as error:
                await self._replace(producer, error)
                raise RequestTooLarge(
                    f"topic {self.topic} takes no request of {len(value)} bytes: raise its max.message.bytes"
                ) from error
            except SPOILED as error:
                await self._replace(producer, error)
            except KafkaError as error:
                await self._replace(producer, error)
                raise ClientError(f"topic {self.topic} refused a request: {error}") from error
        raise ClientError(f"topic {self.topic} refused a request {ATTEMPTS} times: see the broker's log")

    async def close(self) -> None:
        """Disconnect. Records that no broker has taken within 3 seconds are given up."""
        async with self._replacing:
            if self._producer is not None:
                self._retire(self._producer)
                self._producer = None
        if self._retiring:
            await asyncio.wait(self._retiring)

    def _current(self) -> AIOKafkaProducer:
        if self._producer is None:
            raise ClientError(f"topic {self.topic}: not connected")
        return self._producer

    async def _connect(self) -> AIOKafkaProducer:
        producer = AIOKafkaProducer(**self._options, acks="all", enable_idempotence=True)
        try:
            await producer.start()
        except BaseException:
            await producer.stop()
            raise
        return producer

    async def _replace(self, spoiled: AIOKafkaProducer, cause: KafkaError) -> None:
        async with self._replacing:
            if self._producer is not spoiled:
                return
            log.warning("topic %s: a new producer after %r", self.topic, cause)
            try:
                self._producer = await self._connect()
            except KafkaError as error:
                raise ClientError(f"topic {self.topic}: cannot connect again: {error}") from error
            self._retire(spoiled)

    def _retire(self, producer: AIOKafkaProducer) -> None:
        task = asyncio.create_task(stop_producer(producer), name="loramux-stop-producer")
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)


async def stop_producer(producer: AIOKafkaProducer) -> None:
    """Flush and stop; a producer whose broker is away is stopped without flushing.

    aiokafka's stop() waits until everything is delivered, however long no broker answers, and would go on
    waiting for batches that nobody sends any more. So its sender is ended first and then its batches are
    failed.
    """
    stopping = asyncio.create_task(producer.stop(), name="loramux-flush-producer")
    await asyncio.wait([stopping], timeout=FLUSH_SECONDS)
    if stopping.done() and not stopping.cancelled() and stopping.exception() is None:
        return
    sending = producer._sender.sender_task
    if sending is not None:
        sending.cancel()
        await asyncio.wait([sending], timeout=FLUSH_SECONDS)
    producer._message_accumulator.fail_all(ProducerClosed())
    await asyncio.wait([stopping], timeout=FLUSH_SECONDS)
    # stop() ends before this where a request to a silent broker is still out.
    await producer.client.close()
