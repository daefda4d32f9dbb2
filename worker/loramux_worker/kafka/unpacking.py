"""A bound for what a compressed batch of requests may unpack to.

Seven kilobytes of zstd can stand for two hundred megabytes, and aiokafka unpacks whatever comes, on the event loop.
Where the broker does not refuse such batches (deploy/SECURITY.md), `bound_unpacking` has aiokafka's parsers raise
CorruptRecordException for one; `tolerant_fetch` then leaves it out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, Final

import cramjam
from aiokafka.codec import snappy_decode
from aiokafka.errors import CorruptRecordException

MAX_UNPACKED_BYTES: Final = 32 << 20
GUESSED_RATIO: Final = 8  # most text packs to no less than an eighth
SMALLEST_GUESS: Final = 64 << 10

XERIAL_HEADER: Final = b"\x82SNAPPY\x00"
XERIAL_HEADER_BYTES: Final = 16

PARSERS: Final = (
    "aiokafka.record.default_records",
    "aiokafka.record.legacy_records",
    "aiokafka.record._crecords.default_records",
    "aiokafka.record._crecords.legacy_records",
)

Unpack = Callable[[Any], bytes]


class UnpacksTooLarge(CorruptRecordException):  # type: ignore[misc]
    """A batch that unpacks to more than MAX_UNPACKED_BYTES."""

    def __init__(self) -> None:
        super().__init__(f"a batch unpacks to more than {MAX_UNPACKED_BYTES} bytes")


def bound_unpacking() -> None:
    """From now on every consumer of this process refuses batches that unpack to too much. Idempotent."""
    bounded: dict[str, Unpack] = {
        "gzip_decode": lambda packed: _unpacked(cramjam.gzip.decompress_into, packed),
        "lz4_decode": lambda packed: _unpacked(cramjam.lz4.decompress_into, packed),
        "zstd_decode": lambda packed: _unpacked(cramjam.zstd.decompress_into, packed),
        "snappy_decode": _unpacked_snappy,
    }
    for name in PARSERS:
        try:
            parser = importlib.import_module(name)
        except ModuleNotFoundError:  # aiokafka without its C extensions
            continue
        for function in bounded.keys() & vars(parser).keys():
            setattr(parser, function, bounded[function])


def _unpacked(decompress_into: Callable[[bytes, bytearray], int], packed: Any) -> bytes:
    """Unpack into a buffer that grows up to the bound: no codec says beforehand what it needs."""
    packed = bytes(packed)
    size = max(SMALLEST_GUESS, GUESSED_RATIO * len(packed))
    while True:
        buffer = bytearray(min(size, MAX_UNPACKED_BYTES))
        try:
            count = decompress_into(packed, buffer)
        except cramjam.DecompressionError as error:
            if "write whole buffer" not in str(error):
                raise CorruptRecordException(f"a batch does not unpack: {error}") from None
            if size >= MAX_UNPACKED_BYTES:
                raise UnpacksTooLarge from None
            size *= GUESSED_RATIO
        else:
            return bytes(memoryview(buffer)[:count])


def _unpacked_snappy(packed: Any) -> bytes:
    """Snappy says what each of its blocks needs. Kafka's own clients write many blocks behind a header of xerial's."""
    packed = bytes(packed)
    try:
        if sum(map(cramjam.snappy.decompress_raw_len, _snappy_blocks(packed))) > MAX_UNPACKED_BYTES:
            raise UnpacksTooLarge
        return bytes(snappy_decode(packed))
    except cramjam.DecompressionError as error:
        raise CorruptRecordException(f"a batch does not unpack: {error}") from None


def _snappy_blocks(packed: bytes) -> list[bytes]:
    if not packed.startswith(XERIAL_HEADER):
        return [packed]
    blocks, at = [], XERIAL_HEADER_BYTES
    while at + 4 <= len(packed):
        size = int.from_bytes(packed[at : at + 4], "big")
        blocks.append(packed[at + 4 : at + 4 + size])
        at += 4 + size
    return blocks
