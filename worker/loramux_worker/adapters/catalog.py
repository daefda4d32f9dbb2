"""The catalog: from an adapter's name in a request to its files on the local disk.

    fetch(name) ─► on disk, and looked up within `revision_ttl`? ─► that revision
                └► refresh: ask the store, download what is new ─► the store's revision

One refresh at a time per adapter, however many requests wait for it; requests for other adapters never do.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import structlog

from loramux_schemas import AdapterName, ErrorCode
from loramux_worker.adapters.disk import DiskTier
from loramux_worker.adapters.refresh import REFUSAL_TTL, CatalogStats, Place, Refresher
from loramux_worker.adapters.store import Store
from loramux_worker.engine.protocol import AdapterMoved, AdapterReference
from loramux_worker.errors import ConfigurationError, RequestFailed

log = structlog.get_logger(__name__)

OUTAGE_TTL = 5.0  # seconds in which a store that failed is not asked again about an adapter that is on disk
EVICTION_SECONDS = 0.01  # between two looks at an adapter that is just being evicted


class AdapterCatalog:
    """Finds adapters in the disk tier and in the store behind it. It owns the disk tier: `close` closes both.

    `store` None: only the base model is served. `revision_ttl`: seconds for which the store is not asked
    again about an adapter. `adapter_timeout`: seconds that an adapter may take to arrive, waiting for one of
    the `max_downloads` slots included. `patience`: seconds that a request waits for the store when an older
    revision is on disk. `on_load` is told of each download.
    """

    def __init__(
        self,
        store: Store | None,
        disk: DiskTier,
        *,
        revision_ttl: float,
        adapter_timeout: float,
        max_downloads: int = 8,
        patience: float = 2.0,
        clock: Callable[[], float] = time.monotonic,
        on_load: Callable[[AdapterMoved], None] = lambda moved: None,
    ) -> None:
        self.disk = disk
        self.stats = CatalogStats()
        self._max_downloads = max_downloads
        self._patience = patience
        self._clock = clock
        self._outage_ttl = min(OUTAGE_TTL, revision_ttl)
        self._refresher: Refresher | None = None
        if store is not None:
            self._refresher = Refresher(
                store,
                disk,
                self.stats,
                revision_ttl=revision_ttl,
                adapter_timeout=adapter_timeout,
                max_downloads=max_downloads,
                clock=clock,
                on_load=on_load,
            )

    async def fetch(self, name: AdapterName) -> AdapterReference:
        """Brings an adapter to the local disk. The folder stays only while leased: see `acquire` and `lease`.

        Raises RequestFailed: `adapter_not_found`, `adapter_invalid`, or `adapter_unavailable` when it does
        not arrive in time. Cancelling one caller leaves the work to the others.
        """
        if self._refresher is None:
            raise RequestFailed(
                ErrorCode.ADAPTER_NOT_FOUND,
                f"there is no adapter '{name}': this worker has no --adapter-uri, only the base model",
            )
        place = self._refresher.place(name.adapter_id)
        on_disk = await self._on_disk(name, place)
        self.stats.lookups["disk", "hit" if on_disk is not None else "miss"] += 1
        if name.revision is not None:
            return on_disk or await self._fetch_pinned(self._refresher, name, place)
        if on_disk is None:
            return await _outcome(self._refresher.start(name.adapter_id))
        if self._clock() < place.fresh_until:
            return on_disk
        return await self._fetch_or_keep(self._refresher, on_disk, place)

    async def acquire(self, name: AdapterName) -> AdapterReference:
        """Like `fetch`, and leases the folder: it stays until `release`."""
        while True:
            reference = await self.fetch(name)
            # Between the end of a download and here another adapter may have needed the room.
            if self.disk.acquire(reference.revision):
                return reference
            await asyncio.sleep(EVICTION_SECONDS)

    def release(self, reference: AdapterReference) -> None:
        """Ends a lease that `acquire` took."""
        self.disk.release(reference.revision)

    @contextmanager
    def lease(self, reference: AdapterReference) -> Iterator[AdapterReference]:
        """Keeps a fetched folder until the end of the block, so that an engine can read it.

        Raises RequestFailed (`adapter_unavailable`) when it has been evicted since it was fetched.
        """
        if not self.disk.acquire(reference.revision):
            raise RequestFailed(
                ErrorCode.ADAPTER_UNAVAILABLE,
                f"adapter '{reference.adapter_id}' has left the disk cache again",
            )
        try:
            yield reference
        finally:
            self.release(reference)

    async def preload(self, adapter_ids: Iterable[str]) -> tuple[AdapterReference, ...]:
        """Fetches the adapters of `--adapters`, few at a time: none spends its time waiting for a slot.

        Raises ConfigurationError for one that cannot be had.
        """
        slots = asyncio.Semaphore(self._max_downloads)

        async def fetch(text: str) -> AdapterReference:
            async with slots:
                try:
                    return await self.fetch(AdapterName.parse(text))
                except (RequestFailed, ValueError) as error:
                    raise ConfigurationError(f"--adapters {text}: {error}") from error

        results = await asyncio.gather(*map(fetch, adapter_ids), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return tuple(result for result in results if not isinstance(result, BaseException))

    async def close(self) -> None:
        """Ends the refreshes under way, whose callers see `adapter_unavailable`, and closes the disk tier."""
        if self._refresher is not None:
            await self._refresher.close()
        await self.disk.close()

    async def _on_disk(self, name: AdapterName, place: Place) -> AdapterReference | None:
        """The pinned or else the last known revision, if it is on disk.

        A pin counts only where this very adapter has had that revision: no name leads to another adapter's
        files.
        """
        revision = place.known.current if name.revision is None else name.revision
        if revision is None or revision not in place.known:
            return None
        path = await self.disk.get(revision)
        return None if path is None else AdapterReference(name.adapter_id, revision, str(path))

    async def _fetch_pinned(self, refresher: Refresher, name: AdapterName, place: Place) -> AdapterReference:
        """A pinned revision that is not on disk: the store has it only if it is the current one."""
        just_looked = self._clock() < place.looked_at + REFUSAL_TTL
        if not just_looked or place.known.current == name.revision:
            reference = await _outcome(refresher.start(name.adapter_id))
            if reference.revision == name.revision:
                return reference
        raise RequestFailed(
            ErrorCode.ADAPTER_NOT_FOUND, f"adapter '{name.adapter_id}' has no revision '{name.revision}' now"
        )

    async def _fetch_or_keep(self, refresher: Refresher, on_disk: AdapterReference, place: Place) -> AdapterReference:
        """The store's revision, or the one on disk while the store is slow or does not answer."""
        if not self.disk.acquire(on_disk.revision):  # another process has just evicted it
            return await _outcome(refresher.start(on_disk.adapter_id))
        try:
            refresh = refresher.start(on_disk.adapter_id)
            done, _ = await asyncio.wait({refresh}, timeout=self._patience)
            try:
                if done:
                    return await _outcome(refresh)
            except RequestFailed as failure:
                if failure.code != ErrorCode.ADAPTER_UNAVAILABLE:
                    raise
            place.fresh_until = self._clock() + self._outage_ttl
            log.warning("adapter_not_refreshed", adapter_id=on_disk.adapter_id, serving=on_disk.revision)
            return on_disk
        finally:
            self.release(on_disk)


async def _outcome(refresh: asyncio.Task[AdapterReference]) -> AdapterReference:
    """Waits for a refresh that others may wait for too: cancelling this does not cancel that."""
    await asyncio.wait({refresh})
    if refresh.cancelled():
        raise RequestFailed(ErrorCode.ADAPTER_UNAVAILABLE, "the worker is stopping")
    return refresh.result()
