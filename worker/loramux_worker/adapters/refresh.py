"""Refreshes: bring the revision that the store holds now to the local disk, one at a time per adapter."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import structlog

from loramux_schemas import ErrorCode
from loramux_worker.adapters.disk import DiskTier
from loramux_worker.adapters.disk_survey import is_full
from loramux_worker.adapters.revisions import KnownRevisions
from loramux_worker.adapters.source import StoreChanged, StoredFile
from loramux_worker.adapters.store import Store
from loramux_worker.adapters.together import in_thread, together
from loramux_worker.engine.protocol import AdapterMoved, AdapterReference
from loramux_worker.errors import RequestFailed

log = structlog.get_logger(__name__)

REFUSAL_TTL = 3.0  # seconds in which the store is not asked again about an adapter that it does not have
MAX_REFUSALS = 4096
MAX_LISTINGS = 64  # looked up at the same time
MAX_ATTEMPTS = 5  # at an adapter that is being written while it is read


@dataclass(slots=True)
class CatalogStats:
    """Counters since the start. `lookups` by (tier, result): disk hit or miss, store hit or an error code."""

    lookups: Counter[tuple[str, str]] = field(default_factory=Counter)
    downloads: int = 0
    downloaded_bytes: int = 0
    load_seconds: float = 0.0


@dataclass(slots=True)
class Place:
    """What an adapter's place in the store has held; `looked_at` and `fresh_until` are times of the clock."""

    known: KnownRevisions
    looked_at: float = float("-inf")
    fresh_until: float = float("-inf")


class Refresher:
    """The refreshes under way, and what earlier ones learned. Parameters as in `AdapterCatalog`."""

    def __init__(
        self,
        store: Store,
        disk: DiskTier,
        stats: CatalogStats,
        *,
        revision_ttl: float,
        adapter_timeout: float,
        max_downloads: int,
        clock: Callable[[], float],
        on_load: Callable[[AdapterMoved], None],
    ) -> None:
        self._store = store
        self._disk = disk
        self._stats = stats
        self._revision_ttl = revision_ttl
        self._adapter_timeout = adapter_timeout
        self._clock = clock
        self._on_load = on_load
        self._places: dict[str, Place] = {}
        self._refusals: dict[str, tuple[float, RequestFailed]] = {}
        self._tasks: dict[str, asyncio.Task[AdapterReference]] = {}
        self._downloads = asyncio.Semaphore(max_downloads)
        self._listings = asyncio.Semaphore(MAX_LISTINGS)

    def place(self, adapter_id: str) -> Place:
        """What is known about an adapter, from memory or from an earlier run of a worker."""
        if (place := self._places.get(adapter_id)) is None:
            place = Place(self._disk.index.get(self._store.uri(adapter_id)))
            # A flood of names that lead nowhere must not fill the memory.
            if place.known.history:
                self._places[adapter_id] = place
        return place

    def start(self, adapter_id: str) -> asyncio.Task[AdapterReference]:
        """The refresh of an adapter that is under way, or a new one; who waits for it must not cancel it.

        Raises RequestFailed at once when the store has just refused the adapter.
        """
        if (task := self._tasks.get(adapter_id)) is not None:
            return task
        until, refusal = self._refusals.get(adapter_id, (float("-inf"), None))
        if refusal is not None and self._clock() < until:
            raise RequestFailed(refusal.code, refusal.message)
        task = asyncio.create_task(self._refresh(adapter_id), name=f"refresh {adapter_id}")
        self._tasks[adapter_id] = task
        task.add_done_callback(lambda done: self._end(adapter_id, done))
        return task

    async def close(self) -> None:
        """Cancels what is under way."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _end(self, adapter_id: str, task: asyncio.Task[AdapterReference]) -> None:
        del self._tasks[adapter_id]
        if task.cancelled():
            return
        failure = task.exception()
        if isinstance(failure, RequestFailed):
            self._stats.lookups["store", failure.code.value] += 1
            if not failure.code.retryable:
                self._remember_refusal(adapter_id, failure)
        elif failure is None:
            self._stats.lookups["store", "hit"] += 1

    def _remember_refusal(self, adapter_id: str, refusal: RequestFailed) -> None:
        self._refusals.pop(adapter_id, None)
        if len(self._refusals) >= MAX_REFUSALS:
            del self._refusals[next(iter(self._refusals))]
        self._refusals[adapter_id] = (self._clock() + REFUSAL_TTL, refusal)

    async def _refresh(self, adapter_id: str) -> AdapterReference:
        try:
            async with asyncio.timeout(self._adapter_timeout):
                return await self._synchronise(adapter_id)
        except TimeoutError:
            raise RequestFailed(
                ErrorCode.ADAPTER_UNAVAILABLE,
                f"adapter '{adapter_id}' did not arrive within {self._adapter_timeout:g} s",
            ) from None
        except OSError as error:
            log.error("adapter_cache_failed", adapter_id=adapter_id, error=str(error))
            what = "the disk of the adapter cache is full" if is_full(error) else "the adapter cache cannot be used"
            raise RequestFailed(ErrorCode.ADAPTER_UNAVAILABLE, f"adapter '{adapter_id}': {what}") from error

    async def _synchronise(self, adapter_id: str) -> AdapterReference:
        """Lists, and downloads unless these very files are on disk already."""
        for _ in range(MAX_ATTEMPTS):
            files = await self._list(adapter_id)
            fingerprint = _fingerprint(files)
            revision = await self._on_disk(self.place(adapter_id).known, fingerprint)
            if revision is not None:
                await self._remember(adapter_id, fingerprint, revision)
            else:
                try:
                    revision = await self._download_alone(adapter_id, files, fingerprint)
                except StoreChanged as change:
                    log.info("adapter_changed_while_read", adapter_id=adapter_id, change=str(change))
                    continue
            return AdapterReference(adapter_id, revision, str(self._disk.folder_of(revision)))
        raise RequestFailed(
            ErrorCode.ADAPTER_UNAVAILABLE, f"adapter '{adapter_id}' changes in the store while it is read"
        )

    async def _list(self, adapter_id: str) -> tuple[StoredFile, ...]:
        try:
            async with self._listings:
                return await self._store.list(adapter_id)
        except RequestFailed as refusal:
            if refusal.code == ErrorCode.ADAPTER_NOT_FOUND:
                # Deleted in the store is deleted here: the name leads to none of its revisions any more.
                if (place := self._places.pop(adapter_id, None)) is not None:
                    place.known = KnownRevisions()
                self._disk.index.forget(self._store.uri(adapter_id))
            raise

    async def _on_disk(self, known: KnownRevisions, fingerprint: str) -> str | None:
        """The revision of the files with this fingerprint if it is known and here."""
        revision = known.find(fingerprint)
        return revision if revision is not None and await self._disk.get(revision) is not None else None

    async def _download_alone(self, adapter_id: str, files: tuple[StoredFile, ...], fingerprint: str) -> str:
        """Brings the listed files to disk, or waits while another process of this host does; their revision."""
        uri = self._store.uri(adapter_id)
        async with self._disk.alone(f"{uri}\n{fingerprint}"):
            revision = await self._on_disk(self._disk.index.get(uri), fingerprint)
            if revision is None:
                revision = await self._download(adapter_id, files)
            await self._remember(adapter_id, fingerprint, revision)
            return revision

    async def _download(self, adapter_id: str, files: tuple[StoredFile, ...]) -> str:
        """Brings the listed files to disk, on a disk that proves full after evicting others; their revision."""
        size = sum(file.size for file in files)
        async with self._downloads:
            started = self._clock()
            while True:
                try:
                    revision = await self._transfer(adapter_id, files, size)
                    break
                except OSError as error:
                    if not is_full(error) or not await self._disk.make_free(size):
                        raise
                    log.warning("adapter_cache_full", adapter_id=adapter_id)
        seconds = self._clock() - started
        self._stats.downloads += 1
        self._stats.downloaded_bytes += size
        self._stats.load_seconds += seconds
        reference = AdapterReference(adapter_id, revision, str(self._disk.folder_of(revision)))
        self._on_load(AdapterMoved(reference, "disk", time.time(), seconds))
        log.info(
            "adapter_downloaded",
            adapter_id=adapter_id,
            revision=revision,
            size=size,
            seconds=round(seconds, 3),
        )
        return revision

    async def _transfer(self, adapter_id: str, files: tuple[StoredFile, ...], size: int) -> str:
        async with self._disk.incoming(size) as folder:
            digests = await together(*(self._store.download(adapter_id, file, folder / file.name) for file in files))
            # Each file was what the listing said; were they so together, and not rewritten while read?
            if await self._list(adapter_id) != files:
                raise StoreChanged(f"adapter '{adapter_id}' has changed")
            return await self._disk.adopt(folder, digests)

    async def _remember(self, adapter_id: str, fingerprint: str, revision: str) -> None:
        place = self.place(adapter_id)
        known = place.known.with_current(fingerprint, revision)
        if known != place.known:
            place.known = known
            try:
                await in_thread(self._disk.index.put, self._store.uri(adapter_id), known)
            except OSError as error:  # the adapter is here all the same; the next start will fetch it again
                log.warning("adapter_not_remembered", adapter_id=adapter_id, error=str(error))
        self._places[adapter_id] = place
        place.looked_at = self._clock()
        place.fresh_until = place.looked_at + self._revision_ttl


def _fingerprint(files: Iterable[StoredFile]) -> str:
    """One word for all that a listing says: the same word, the same files."""
    text = "\n".join(f"{file.name}\0{file.size}\0{file.version}" for file in sorted(files, key=lambda file: file.name))
    return hashlib.sha256(text.encode()).hexdigest()
