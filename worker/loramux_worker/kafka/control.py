"""The control topic: every worker reads the whole of it, without a consumer group.

    control = ControlReader(connection, "lora.control", memory=600, on_cancel=cancellations.cancel)
    await control.start()                 # what was said in the last ten minutes has been read
    …
    await control.close()

A broker that goes away is waited for; what is no message of ours is logged and passed over.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

import structlog
from aiokafka import AIOKafkaConsumer, ConsumerRecord, TopicPartition
from aiokafka.errors import CorruptRecordException, KafkaError

from loramux_schemas import Cancellation, KafkaConnection, UnparseableMessage
from loramux_worker.kafka.connecting import RETRY_SECONDS, TROUBLE, client_options, started
from loramux_worker.kafka.consumer import stop
from loramux_worker.kafka.outage import Outage
from loramux_worker.kafka.tolerant_fetch import fetch_tolerantly

CATCH_UP_SECONDS: Final = 10.0
POLL_MS: Final = 500
RECORDS_A_TURN: Final = 500  # handled at one go before other tasks of the loop get their turn

log = structlog.get_logger(__name__)


class ControlReader:
    """Calls `on_cancel(request_id, at)` for each cancellation, `at` being its Unix time in seconds.

    Begins with what is at most `memory` seconds old. Some messages may be told twice, after an outage.
    """

    def __init__(
        self,
        connection: KafkaConnection,
        topic: str,
        *,
        memory: float,
        on_cancel: Callable[[str, float], None],
        startup_timeout: float = 30.0,
    ) -> None:
        self._connection = connection
        self._topic = topic
        self._memory = memory
        self._on_cancel = on_cancel
        self._startup_timeout = startup_timeout
        self._outage = Outage("reading the control topic")
        self._options: dict[str, Any] = {
            **client_options(connection),
            "group_id": None,
            "enable_auto_commit": False,
            "isolation_level": "read_committed",
            # Only for when the broker has lost what we stood at: reading twice is harmless, skipping is not.
            "auto_offset_reset": "earliest",
            "metadata_max_age_ms": 30_000,
            "retry_backoff_ms": 250,
        }
        self._consumer: AIOKafkaConsumer | None = None
        self._positions: dict[TopicPartition, int] = {}
        self._ends: dict[TopicPartition, int] = {}
        self._caught_up = asyncio.Event()
        self._reading: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Connects, and returns when what was there is read, after CATCH_UP_SECONDS at the latest.

        Raises ConfigurationError when no broker answers within `startup_timeout` seconds.
        """
        self._consumer = await started(
            self._connection, lambda: AIOKafkaConsumer(**self._options), stop, timeout=self._startup_timeout
        )
        self._reading = asyncio.create_task(self._run(), name="read-control-topic")
        try:
            async with asyncio.timeout(CATCH_UP_SECONDS):
                await self._caught_up.wait()
        except TimeoutError:
            log.warning("control_topic_unread", topic=self._topic, seconds=CATCH_UP_SECONDS)

    async def close(self) -> None:
        """Stops reading and disconnects."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.wait([self._reading])
        if self._consumer is not None:
            await stop(self._consumer)

    async def _run(self) -> None:
        while True:
            try:
                consumer = await self._connected()
                await self._take_new_partitions(consumer)
                await self._poll(consumer)
                self._outage.over()
            except Exception as error:
                self._outage.failed("reading", error)
                if not isinstance(error, TROUBLE):
                    log.error("control_topic_failed", exc_info=error)
                await self._disconnect()
                await asyncio.sleep(RETRY_SECONDS)

    async def _connected(self) -> AIOKafkaConsumer:
        if self._consumer is None:
            consumer = AIOKafkaConsumer(**self._options)
            try:
                await consumer.start()
            except BaseException:
                await stop(consumer)
                raise
            self._consumer = consumer
            self._assign(consumer)
        return self._consumer

    async def _disconnect(self) -> None:
        consumer, self._consumer = self._consumer, None
        if consumer is not None:
            await stop(consumer)

    async def _take_new_partitions(self, consumer: AIOKafkaConsumer) -> None:
        if not self._positions:
            # The first question makes aiokafka fetch the topic's metadata; only then are its partitions known.
            await consumer.end_offsets([TopicPartition(self._topic, 0)])
        numbers = consumer.partitions_for_topic(self._topic) or ()
        names = [TopicPartition(self._topic, number) for number in sorted(numbers)]
        new = [name for name in names if name not in self._positions]
        if not new:
            return
        # The ends before the times: what comes in between is read, too.
        ends = await consumer.end_offsets(new)
        since = int((time.time() - self._memory) * 1000)
        found = await consumer.offsets_for_times(dict.fromkeys(new, since))
        if not self._positions:
            self._ends = ends
        for name in new:
            first = found.get(name)
            self._positions[name] = ends[name] if first is None else first.offset
        self._assign(consumer)

    def _assign(self, consumer: AIOKafkaConsumer) -> None:
        if self._positions:
            consumer.assign(list(self._positions))
        for name, position in self._positions.items():
            consumer.seek(name, position)

    async def _poll(self, consumer: AIOKafkaConsumer) -> None:
        if not self._caught_up.is_set() and await self._has_caught_up(consumer):
            self._caught_up.set()
        try:
            batches = await consumer.getmany(timeout_ms=POLL_MS, max_records=RECORDS_A_TURN)
        except (UnicodeDecodeError, CorruptRecordException):
            await self._poll_tolerantly(consumer)
            return
        for name, messages in batches.items():
            self._take(messages)
            self._positions[name] = messages[-1].offset + 1
        if not batches and consumer._fetcher.error_future.done():
            # aiokafka's own task has died: from now on it would return nothing for ever.
            raise KafkaError("fetching ended unexpectedly")
        await asyncio.sleep(0)  # with records at hand getmany() returns without a pause

    async def _has_caught_up(self, consumer: AIOKafkaConsumer) -> bool:
        # Not `_positions`: behind the last message there may be transaction markers, which nobody is given.
        return all([await consumer.position(name) >= end for name, end in self._ends.items()])

    async def _poll_tolerantly(self, consumer: AIOKafkaConsumer) -> None:
        """Read on where a message has headers that aiokafka cannot read."""
        for name, position in list(self._positions.items()):
            messages, behind = await fetch_tolerantly(self._connection, name, position)
            self._take(messages)
            self._positions[name] = max(position, behind)
        self._assign(consumer)

    def _take(self, messages: Iterable[ConsumerRecord]) -> None:
        for message in messages:
            try:
                cancellation = Cancellation.from_json(message.value)
            except UnparseableMessage as error:
                log.warning(
                    "control_message_unreadable",
                    topic=self._topic,
                    partition=message.partition,
                    offset=message.offset,
                    reason=error.reason,
                )
                continue
            self._on_cancel(cancellation.request_id, message.timestamp / 1000)
