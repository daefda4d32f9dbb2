"""Reading past what aiokafka cannot: records whose header names are not UTF-8, batches that unpack to too much.

Any producer can write such a record, and aiokafka's parser then raises for the whole batch, again and again:
one message would stop its partition for good. Here the same batches are fetched and parsed once more; a byte
of a header's name that is not UTF-8 becomes its escape (`\\xff`). Values, keys and header values come as they
are. A batch beyond the bound of `unpacking` holds nothing: its records cannot be answered, which is logged.
"""

from __future__ import annotations

import struct
from typing import Any, Final

import structlog
from aiokafka import ConsumerRecord, TopicPartition
from aiokafka.client import AIOKafkaClient
from aiokafka.consumer.fetcher import READ_COMMITTED, PartitionRecords
from aiokafka.errors import LeaderNotAvailableError, NoError, for_code
from aiokafka.protocol.fetch import FetchRequest
from aiokafka.record.default_records import _DefaultRecordBatchPy
from aiokafka.record.memory_records import MemoryRecords

from loramux_schemas import KafkaConnection
from loramux_worker.kafka.connecting import client_options
from loramux_worker.kafka.unpacking import UnpacksTooLarge

MAX_BYTES: Final = 1 << 20
WAIT_MS: Final = 100
PREFIX: Final = struct.Struct(">qi")  # base offset, length of what follows
MAGIC_OFFSET: Final = 16

log = structlog.get_logger(__name__)


async def fetch_tolerantly(
    connection: KafkaConnection, name: TopicPartition, position: int
) -> tuple[list[ConsumerRecord], int]:
    """About a megabyte of committed records from `position` on, and the position behind them.

    Raises KafkaError, OSError or TimeoutError.
    """
    client = AIOKafkaClient(**client_options(connection))
    try:
        await client.bootstrap()
        leader = (await client.fetch_all_metadata()).leader_for_partition(name)
        if leader is None or leader == -1:
            raise LeaderNotAvailableError(name)
        wanted = [(name.topic, [(name.partition, position, MAX_BYTES)])]
        answer = await client.send(leader, FetchRequest(WAIT_MS, 1, MAX_BYTES, READ_COMMITTED, wanted))
    finally:
        await client.close()
    [(_, [(_, error_code, _, *fields)])] = answer.topics
    if (error := for_code(error_code)) is not NoError:
        raise error(name)
    # Before the records come the aborted transactions and, since version 11, the preferred replica.
    aborted = fields[2] if answer.API_VERSION >= 11 else fields[-2]
    parsed = PartitionRecords(name, TolerantRecords(fields[-1]), aborted, position, None, None, True, READ_COMMITTED)
    return list(parsed), parsed.next_fetch_offset


class TolerantRecords:
    """A fetch's batches as PartitionRecords asks for them; a last one that is cut off is left out."""

    def __init__(self, fetched: bytes) -> None:
        self._fetched = fetched
        self._at = 0

    def has_next(self) -> bool:
        """Whether another whole batch is there."""
        return self._at + PREFIX.size <= len(self._fetched) and self._end() <= len(self._fetched)

    def next_batch(self) -> Any:
        """The next batch, an iterator of records."""
        batch = bytes(self._fetched[self._at : self._end()])
        self._at = self._end()
        # Formats before 2 know no headers.
        return TolerantBatch(batch) if batch[MAGIC_OFFSET] >= 2 else MemoryRecords(batch).next_batch()

    def _end(self) -> int:
        _, length = PREFIX.unpack_from(self._fetched, self._at)
        return self._at + PREFIX.size + int(length)


class TolerantBatch(_DefaultRecordBatchPy):  # type: ignore[misc]
    """aiokafka's batch in Python, whose only text are the names of headers."""

    _buffer: bytearray

    def _maybe_uncompress(self) -> None:
        try:
            super()._maybe_uncompress()
        except UnpacksTooLarge as error:
            span = {"first": self.base_offset, "last": self.next_offset - 1}
            log.error("requests_not_unpacked", reason=error.args[0], **span)
            self._pos, self._buffer, self._decompressed = 0, bytearray(), True
            self._next_record_index = self._num_records  # as if each had been read
        self._buffer = EscapingBytes(self._buffer)


class EscapingBytes(bytearray):
    """Bytes whose slices decode whatever they hold."""

    def __getitem__(self, index: Any) -> Any:
        piece = super().__getitem__(index)
        return EscapingBytes(piece) if isinstance(index, slice) else piece

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        """As bytes.decode, but what is not UTF-8 becomes `\\xNN`."""
        return super().decode(encoding, "backslashreplace")
