"""Reads one topic from its end or a given place on: every partition, no consumer group, committed records only."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.structs import ConsumerRecord

from loramux_producer.errors import ClientError

log = logging.getLogger(__name__)

POLL_MS = 500
# So many records are handled at one go before other tasks of the loop get their turn.
RECORDS_A_TURN = 500
STOP_SECONDS = 5.0


class TopicTail:
    """Calls `on_record` for each record that is produced to `topic` after `start()` has returned.

    `on_record` must be quick and raise nothing. When reading ends other than by `close()`, `on_failure` gets
    the cause, once. Partitions that the topic gains later are read from their first record. `options` are
    keyword arguments of an aiokafka client.
    """

    def __init__(
        self,
        topic: str,
        options: Mapping[str, Any],
        *,
        on_record: Callable[[ConsumerRecord[bytes, bytes]], None],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self.topic = topic
        self._options = options
        self._on_record = on_record
        self._on_failure = on_failure
        self._consumer: AIOKafkaConsumer | None = None
        self._task: asyncio.Task[None] | None = None
        # Offset of the next record of each partition: aiokafka forgets its own when partitions are assigned.
        self._positions: dict[TopicPartition, int] = {}
        # Where the partitions ended at the start, until they have been read to there.
        self._ends: dict[TopicPartition, int] = {}
        self._caught_up = asyncio.Event()

    @property
    def positions(self) -> dict[int, int]:
        """Partition → offset of the record that comes next."""
        return {name.partition: position for name, position in self._positions.items()}

    async def caught_up(self) -> None:
        """Wait until what was there at the start has been handled, or reading has ended."""
        await self._caught_up.wait()

    async def start(self, positions: Mapping[int, int] | None = None) -> None:
        """Connect and stand at `positions`, or at the end of every partition.

        A partition that is not in `positions` is new since then, and read from its first record. Raises KafkaError,
        or ClientError for a missing topic.
        """
        consumer = AIOKafkaConsumer(
            **self._options,
            group_id=None,
            enable_auto_commit=False,
            isolation_level="read_committed",
            # Only for when the broker has lost what we stood at: reading twice is harmless, skipping is not.
            auto_offset_reset="earliest",
        )
        self._consumer = consumer
        try:
            await consumer.start()
            await self.require_topics(self.topic)
            # The first question makes aiokafka fetch the topic's metadata; only then are its partitions known.
            await consumer.end_offsets([TopicPartition(self.topic, 0)])
            self._ends = await consumer.end_offsets(self._partitions())
            self._positions = dict(self._ends) if positions is None else self._known_places(positions)
        except BaseException:
            await self.close()
            raise
        self._assign()
        self._task = asyncio.create_task(self._read(), name=f"loramux-tail-{self.topic}")
        self._task.add_done_callback(self._ended)

    async def require_topics(self, *topics: str) -> None:
        """Raise ClientError unless the cluster has the topics, without creating any. Raises KafkaError."""
        assert self._consumer is not None
        present = await self._consumer.topics()
        for topic in topics:
            if topic not in present:
                raise ClientError(
                    f"topic {topic} does not exist, or this user may not see it: create it, "
                    "or start a worker with --create-topics"
                )

    async def close(self) -> None:
        """Stop reading and disconnect; nothing is called back any more."""
        self._caught_up.set()
        if self._task is not None:
            self._task.remove_done_callback(self._ended)
            self._task.cancel()
            await asyncio.wait([self._task])
        if self._consumer is not None:
            await stop_consumer(self._consumer)

    def _partitions(self) -> list[TopicPartition]:
        assert self._consumer is not None
        numbers = self._consumer.partitions_for_topic(self.topic) or ()
        return [TopicPartition(self.topic, number) for number in sorted(numbers)]

    def _known_places(self, positions: Mapping[int, int]) -> dict[TopicPartition, int]:
        wanted = {name: positions.get(name.partition, 0) for name in self._ends}
        # Beyond the end: the topic is not the one that it was.
        return {name: position if position <= self._ends[name] else 0 for name, position in wanted.items()}

    def _assign(self) -> None:
        assert self._consumer is not None
        self._consumer.assign(list(self._positions))
        for partition, position in self._positions.items():
            self._consumer.seek(partition, position)

    async def _read(self) -> None:
        assert self._consumer is not None
        while True:
            self._take_new_partitions()
            if not self._caught_up.is_set():
                await self._look_how_far()
            batches = await self._consumer.getmany(timeout_ms=POLL_MS, max_records=RECORDS_A_TURN)
            for partition, records in batches.items():
                for record in records:
                    self._on_record(record)
                self._positions[partition] = records[-1].offset + 1
            if not batches:
                self._check_fetcher()
            # With records at hand getmany() returns without a pause, and nobody else would run.
            await asyncio.sleep(0)

    async def _look_how_far(self) -> None:
        assert self._consumer is not None
        # Not `_positions`: behind the last record there may be transaction markers, which nobody is given.
        if all([await self._consumer.position(name) >= end for name, end in self._ends.items()]):
            self._caught_up.set()

    def _take_new_partitions(self) -> None:
        new = [partition for partition in self._partitions() if partition not in self._positions]
        if new:
            log.info("topic %s has %d new partitions", self.topic, len(new))
            self._positions.update(dict.fromkeys(new, 0))
            self._assign()

    def _check_fetcher(self) -> None:
        """Raise when aiokafka's own fetch task has died: getmany() would return nothing for ever."""
        assert self._consumer is not None
        fetching = self._consumer._fetcher.error_future
        if fetching.done():
            cause = None if fetching.cancelled() else fetching.exception()
            raise ClientError(f"topic {self.topic}: fetching ended unexpectedly") from cause

    def _ended(self, task: asyncio.Task[None]) -> None:
        cause = asyncio.CancelledError() if task.cancelled() else task.exception()
        assert cause is not None, "reading has no end of its own"
        log.error("reading topic %s ended: %r", self.topic, cause)
        self._on_failure(cause)
        self._caught_up.set()


async def stop_consumer(consumer: AIOKafkaConsumer) -> None:
    """Stop a consumer, also one whose broker is away.

    aiokafka's stop() then falls over the first of its own fetches that it cancels, and leaves the others and its
    connections behind.
    """
    stopping = asyncio.create_task(consumer.stop(), name="loramux-stop-consumer")
    await asyncio.wait([stopping], timeout=STOP_SECONDS)
    if stopping.done() and not stopping.cancelled() and stopping.exception() is None:
        return
    stopping.cancel()
    fetches = (
        [] if consumer._fetcher is None else [task for task in consumer._fetcher._pending_tasks if not task.done()]
    )
    for fetch in fetches:
        fetch.cancel()
    await asyncio.wait([stopping, *fetches], timeout=STOP_SECONDS)
    await consumer._client.close()
