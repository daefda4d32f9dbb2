"""aiokafka's idempotent producer, made anew when it has failed.

A batch that fails leaves a hole in the producer's sequence numbers: the broker rejects everything after it.
So whoever sees a failure asks for a replacement; the first one to ask causes it.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

import structlog
from aiokafka import AIOKafkaProducer
from aiokafka.errors import ProducerClosed

from loramux_schemas import KafkaConnection
from loramux_worker.errors import ConfigurationError, LoramuxError
from loramux_worker.kafka.connecting import client_options, started
from loramux_worker.kafka.outage import Outage

STOP_SECONDS: Final = 10.0

log = structlog.get_logger(__name__)


class PublisherClosed(LoramuxError):
    """The publisher was closed before the record was acknowledged."""


class ReplaceableProducer:
    """The producer of the moment. `compression` is gzip, snappy, lz4, zstd or None."""

    def __init__(
        self, connection: KafkaConnection, *, compression: str | None, startup_timeout: float, outage: Outage
    ) -> None:
        self._connection = connection
        self._startup_timeout = startup_timeout
        self._outage = outage
        self._options: dict[str, Any] = {
            **client_options(connection),
            "acks": "all",
            "enable_idempotence": True,
            "compression_type": compression,
            "linger_ms": 1,
            "retry_backoff_ms": 250,
            "max_request_size": 2**31 - 1,  # sizes are checked by topic, before a record comes here
        }
        self._current: AIOKafkaProducer | None = None
        self._lock = asyncio.Lock()
        self._stopping: set[asyncio.Task[None]] = set()

    @property
    def current(self) -> AIOKafkaProducer:
        """A started producer. Raises PublisherClosed before `start` and after `close`."""
        if self._current is None:
            raise PublisherClosed("the publisher is closed")
        return self._current

    async def start(self) -> None:
        """Connects. Raises ConfigurationError when no broker answers within `startup_timeout` seconds."""
        self._current = await self._make()

    async def replace(self, failed: AIOKafkaProducer) -> None:
        """Returns when `current` is another producer than `failed`, or when closed."""
        async with self._lock:
            while self._current is failed:
                try:
                    fresh = await self._make()
                except ConfigurationError as error:
                    self._outage.failed("connecting", error)
                    continue
                if self._current is failed:
                    self._current = fresh
                    self._stop_aside(failed)
                    log.info("producer_replaced")
                else:
                    await stop(fresh)

    async def close(self) -> None:
        """Sends what is still held, for STOP_SECONDS at most, and disconnects."""
        last, self._current = self._current, None
        if last is not None:
            self._stop_aside(last)
        if self._stopping:
            await asyncio.wait(self._stopping)

    def _stop_aside(self, producer: AIOKafkaProducer) -> None:
        # It may hold records of other senders that can still be sent: nobody has to wait for that.
        task = asyncio.create_task(stop(producer), name="stop-producer")
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)

    async def _make(self) -> AIOKafkaProducer:
        return await started(
            self._connection,
            lambda: AIOKafkaProducer(**self._options),
            stop,
            timeout=self._startup_timeout,
        )


async def stop(producer: AIOKafkaProducer) -> None:
    """Sends what the producer holds, for STOP_SECONDS at most, and disconnects."""
    stopping = asyncio.ensure_future(producer.stop())
    try:
        await asyncio.wait([stopping], timeout=STOP_SECONDS)
        if not stopping.done():
            # stop() has no timeout: it ends when nothing is left to send.
            log.warning("producer_stopped_with_unsent_records")
            producer._message_accumulator.fail_all(ProducerClosed())
            await asyncio.wait([stopping], timeout=1.0)
    finally:
        stopping.cancel()
    if not stopping.done() or stopping.cancelled() or stopping.exception() is not None:
        await producer.client.close()
