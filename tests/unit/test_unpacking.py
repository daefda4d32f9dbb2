"""What a batch may unpack to, in aiokafka's own parsers and with the codecs that Kafka has."""

from __future__ import annotations

import random

import cramjam
import pytest
from aiokafka.errors import CorruptRecordException
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.memory_records import MemoryRecords

from loramux_worker.kafka.tolerant_fetch import TolerantBatch
from loramux_worker.kafka.unpacking import MAX_UNPACKED_BYTES, UnpacksTooLarge, bound_unpacking

CODECS = {"gzip": 1, "snappy": 2, "lz4": 3, "zstd": 4}


@pytest.fixture(autouse=True, scope="module")
def bound() -> None:
    bound_unpacking()
    bound_unpacking()  # a second consumer of the process


def batch(codec: int, *values: bytes) -> bytes:
    builder = DefaultRecordBatchBuilder(2, codec, 0, -1, -1, -1, 1 << 30)
    for offset, value in enumerate(values):
        builder.append(offset, timestamp=1, key=None, value=value, headers=[])
    return bytes(builder.build())


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_batches_within_the_bound_come_as_they_were(codec: int) -> None:
    drawn = random.Random(codec)
    for values in (
        (b"",),
        (b"short", b"x" * 1000),
        (drawn.randbytes(100_000), b"{}" * 500_000),
        (bytes(MAX_UNPACKED_BYTES - 1000),),
    ):
        packed = batch(codec, *values)
        assert tuple(record.value for record in MemoryRecords(packed).next_batch()) == values
        assert tuple(record.value for record in TolerantBatch(packed)) == values


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_a_batch_beyond_the_bound_is_refused_and_then_left_out(codec: int) -> None:
    packed = batch(codec, b"before", bytes(MAX_UNPACKED_BYTES))
    assert len(packed) < MAX_UNPACKED_BYTES / 20
    with pytest.raises(UnpacksTooLarge, match=str(MAX_UNPACKED_BYTES)):
        list(MemoryRecords(packed).next_batch())
    tolerant = TolerantBatch(packed)
    assert list(tolerant) == []
    assert tolerant.next_offset == 2


@pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
def test_what_does_not_unpack_is_corrupt(codec: int) -> None:
    packed = bytearray(batch(codec, b"x" * 1000))
    packed[-20:] = bytes(20)
    with pytest.raises(CorruptRecordException):
        list(MemoryRecords(bytes(packed)).next_batch())


def test_snappy_without_blocks_is_bounded_too() -> None:
    """librdkafka writes one block without xerial's header."""
    for values in ((b"x" * 1000,), (bytes(MAX_UNPACKED_BYTES),)):
        plain = batch(0, *values)
        header, records = bytearray(plain[:61]), plain[61:]
        packed = cramjam.snappy.compress_raw(records)
        header[22] = CODECS["snappy"]
        header[8:12] = (61 - 12 + len(packed)).to_bytes(4, "big")
        read = MemoryRecords(bytes(header) + bytes(packed)).next_batch()
        if len(values[0]) < MAX_UNPACKED_BYTES:
            assert [record.value for record in read] == [values[0]]
        else:
            with pytest.raises(UnpacksTooLarge):
                list(read)
