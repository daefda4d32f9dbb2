"""Bringing one file from a source to the disk: large ones in parts, side by side, each written where it belongs.

The digest follows the parts through the page cache while later ones are still on their way, so that it costs no time
at the end. A part that breaks off goes on where it broke; a server that cannot send parts sends the whole. In memory
are at most PARALLEL_PARTS chunks of the source (a MiB each) and one that is digested.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import random
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loramux_worker.adapters.revisions import FileDigest
from loramux_worker.adapters.source import BrokenOff, NoRanges, Source, StoreChanged, StoredFile, unavailable
from loramux_worker.adapters.together import in_thread, together

if TYPE_CHECKING:
    from typing_extensions import Buffer

PART_BYTES = 8 << 20
PARALLEL_PARTS = 4  # of one file
MAX_BREAKS = 5  # of one part
DIGESTED_BYTES = 1 << 20  # at a time

Span = tuple[int, int]


async def download(
    source: Source, adapter_id: str, file: StoredFile, destination: Path, on_bytes: Callable[[int], None]
) -> FileDigest:
    """Writes a file to `destination`; its digest. `on_bytes` is told the size of each chunk that was written.

    Raises StoreChanged when the file is not what was listed, RequestFailed (`adapter_unavailable`) when the source
    fails, OSError when the disk does.
    """
    with await asyncio.to_thread(open, destination, "w+b", buffering=0) as sink:
        transfer = _Transfer(source, adapter_id, file, sink.fileno(), on_bytes)
        try:
            sha256 = await transfer.run(_parts_of(file.size))
        except NoRanges:
            sha256 = await transfer.run([(0, file.size)])
    if file.sha256 not in (None, sha256):
        raise StoreChanged(f"{file.name} of adapter '{adapter_id}' is not what its digest says")
    return FileDigest(file.name, file.size, sha256)


def backoff_seconds(failures: int) -> float:
    """How long to wait after so many failures in a row: exponential, at most 3 s, with full jitter."""
    return random.uniform(0.0, min(3.0, 0.1 * 2**failures))  # noqa: S311 (nothing secret about it)


@dataclass(frozen=True, slots=True)
class _Transfer:
    """One file on its way to an open descriptor."""

    source: Source
    adapter_id: str
    file: StoredFile
    descriptor: int
    on_bytes: Callable[[int], None]

    async def run(self, spans: list[Span]) -> str:
        """Fetches the spans, a few at a time and in their order; the SHA-256 of the whole in hexadecimal."""
        slots = asyncio.Semaphore(PARALLEL_PARTS)
        arrived = [asyncio.Event() for _ in spans]
        digest = hashlib.sha256()

        async def fetch(span: Span, done: asyncio.Event) -> None:
            async with slots:
                await self._fetch(span)
            done.set()

        async def follow() -> None:
            for (first, last), done in zip(spans, arrived, strict=True):
                await done.wait()
                await in_thread(_digest_span, digest, self.descriptor, first, last)

        await together(*map(fetch, spans, arrived), follow())
        return digest.hexdigest()

    async def _fetch(self, span: Span) -> None:
        first, last = span
        position, breaks = first, 0
        while True:
            try:
                async with aclosing(self.source.read(self.adapter_id, self.file, position, last)) as chunks:
                    async for chunk in chunks:
                        position += await self._write(chunk, position, last)
                if position < last:
                    raise self._another_size()
                return
            except NoRanges:
                if position == first:
                    raise
                position = first
            except BrokenOff as broken:
                breaks += 1
                if breaks == MAX_BREAKS:
                    raise unavailable(self.adapter_id, broken) from broken
                await asyncio.sleep(backoff_seconds(breaks))

    async def _write(self, chunk: Buffer, position: int, last: int) -> int:
        view = memoryview(chunk)
        if position + len(view) > last:
            raise self._another_size()
        await in_thread(_write_at, self.descriptor, view, position)
        self.on_bytes(len(view))
        return len(view)

    def _another_size(self) -> StoreChanged:
        return StoreChanged(f"{self.file.name} of adapter '{self.adapter_id}' is not {self.file.size} bytes long")


def _parts_of(size: int) -> list[Span]:
    return [(first, min(first + PART_BYTES, size)) for first in range(0, size, PART_BYTES)] or [(0, 0)]


def _write_at(descriptor: int, data: memoryview, position: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, position)
        data, position = data[written:], position + written


def _digest_span(digest: hashlib._Hash, descriptor: int, first: int, last: int) -> None:
    while first < last:
        data = os.pread(descriptor, min(DIGESTED_BYTES, last - first), first)
        if not data:
            raise OSError(errno.EIO, "a file that was being written has been cut off")
        digest.update(data)
        first += len(data)
