"""From what a person calls an adapter to its files: a folder of theirs, or an id in the store."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from loramux_schemas import AdapterName, ErrorCode
from loramux_worker.adapters.disk import DiskTier
from loramux_worker.adapters.refresh import CatalogStats, Refresher
from loramux_worker.adapters.revisions import FileDigest
from loramux_worker.adapters.source import StoredFile, first_line
from loramux_worker.adapters.store import AdapterStore
from loramux_worker.cli.adapters.terminal import ByteProgress
from loramux_worker.engine.protocol import AdapterReference
from loramux_worker.errors import ConfigurationError, RequestFailed

MAX_DOWNLOADS = 8
_NO_QUOTA = 1 << 62


@dataclass(frozen=True, slots=True)
class LocalAdapter:
    """An adapter's folder on this machine; `revision` when it came from a store."""

    name: str
    folder: Path
    revision: str | None = None


class WatchedStore(AdapterStore):
    """The store of `--adapter-uri`, with a bar that shows what comes from it."""

    def __init__(self, template: str, timeout: float, progress: ByteProgress) -> None:
        super().__init__(template, timeout=timeout, on_bytes=progress.advance)
        self._progress = progress

    async def download(self, adapter_id: str, file: StoredFile, destination: Path) -> FileDigest:
        """As `AdapterStore.download`."""
        self._progress.expect(file.size)
        return await super().download(adapter_id, file, destination)


class Fetcher:
    """Brings current revisions from a store to a disk tier as a worker does, a few at a time. `close` it."""

    def __init__(self, store: AdapterStore, disk: DiskTier, timeout: float) -> None:
        self._disk = disk
        self._slots = asyncio.Semaphore(MAX_DOWNLOADS)
        self._refresher = Refresher(
            store,
            disk,
            CatalogStats(),
            revision_ttl=0.0,
            adapter_timeout=timeout,
            max_downloads=MAX_DOWNLOADS,
            clock=asyncio.get_running_loop().time,
            on_load=lambda moved: None,
        )

    async def fetch(self, name: AdapterName) -> AdapterReference:
        """The revision that the store holds now, on disk. Raises RequestFailed, another's pin included."""
        async with self._slots:
            reference = await self._refresher.start(name.adapter_id)
        if name.revision not in (None, reference.revision):
            raise RequestFailed(
                ErrorCode.ADAPTER_NOT_FOUND,
                f"adapter '{name.adapter_id}': the store holds {reference.revision} now, not {name.revision}",
            )
        return reference

    async def close(self) -> None:
        """Ends what is under way and closes the disk tier."""
        await self._refresher.close()
        await self._disk.close()


def reason_of(failure: RequestFailed) -> str:
    """Why, in one line; of a store that failed also what it said."""
    cause = failure.__cause__
    return failure.message if cause is None else f"{failure.message}: {first_line(cause)}"


def parse_name(text: str) -> AdapterName:
    """An id or id@revision. Raises ConfigurationError."""
    try:
        return AdapterName.parse(text)
    except ValueError as error:
        raise ConfigurationError(str(error)) from None


def check_source(argument: str, uri: str | None) -> None:
    """See before any work whether an argument can be looked up. Raises ConfigurationError."""
    if not _is_path(argument, uri):
        parse_name(argument)
    elif not Path(argument).expanduser().is_dir():
        raise ConfigurationError(f"{argument}: there is no such folder; for the id of an adapter say --adapter-uri too")


@contextmanager
def local_adapter(argument: str, uri: str | None, timeout: float, progress: ByteProgress) -> Iterator[LocalAdapter]:
    """The adapter's folder, for the length of the block if it has to be fetched.

    Raises ConfigurationError and RequestFailed.
    """
    if uri is None or _is_path(argument, uri):
        yield LocalAdapter(argument, Path(argument).expanduser())
        return
    with tempfile.TemporaryDirectory(prefix="loramux-adapter-") as scratch:
        reference = asyncio.run(_fetch(parse_name(argument), WatchedStore(uri, timeout, progress), scratch, timeout))
        yield LocalAdapter(argument, Path(reference.path), reference.revision)


def _is_path(argument: str, uri: str | None) -> bool:
    return uri is None or argument in (".", "..") or argument.startswith(("/", "./", "../", "~"))


async def _fetch(name: AdapterName, store: AdapterStore, folder: str, timeout: float) -> AdapterReference:
    fetcher = Fetcher(store, DiskTier(folder, _NO_QUOTA), timeout)
    try:
        return await fetcher.fetch(name)
    finally:
        await fetcher.close()
