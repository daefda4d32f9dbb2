"""The disk tier: adapters as folders named by their content. Several processes may share one.

    root/<sha256 hex>/       the files of one revision, complete from the moment the folder is there
    root/names/              which revision a place in the store held last (RevisionIndex)
    root/incoming/<random>/  one process's unfinished downloads (Workspace)
    root/arriving/<hash>/    a download that others wait for

All that processes need to agree on is in the folder itself, so that nothing is lost or left over when one is killed.
Its lock is held while room is made and while a revision is moved in or out. A lease is a shared lock on a revision's
folder: what cannot be locked is not evicted. A folder's modification time is when it was last used, by anyone. The
name of an unfinished download's folder says what it may take, and counts against the quota.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import structlog

from loramux_schemas import ErrorCode
from loramux_worker.adapters.disk_books import DiskBooks, Entry
from loramux_worker.adapters.disk_leases import DiskLeases
from loramux_worker.adapters.disk_survey import folder_size, holds, look_at, survey
from loramux_worker.adapters.folder_locks import locked, locked_at_start, locked_name, remove_abandoned, try_lock
from loramux_worker.adapters.revisions import REVISION_PREFIX, FileDigest, RevisionIndex, is_revision, revision_of
from loramux_worker.adapters.together import in_thread
from loramux_worker.adapters.workspace import Workspace, reserved_bytes
from loramux_worker.errors import ConfigurationError, RequestFailed

log = structlog.get_logger(__name__)

POLL_SECONDS = 0.5  # for what other processes release, of which nobody tells


class DiskTier:
    """Adapters under `root`, at most `quota_bytes` of them; S3-FIFO decides which of those that nobody leases leave.

    Raises ConfigurationError, naming the setting, for a folder that cannot be used and a quota that is none.
    Everything but the constructor belongs to one event loop.
    """

    def __init__(self, root: str | Path, quota_bytes: int) -> None:
        if quota_bytes <= 0:
            raise ConfigurationError("--disk-quota must be more than 0 bytes")
        self.root = Path(root).absolute()
        self.quota_bytes = quota_bytes
        self.evictions = 0
        self._books = DiskBooks(quota_bytes)
        self._leases = DiskLeases()
        self._freed = asyncio.Event()
        self._turn = asyncio.Lock()  # to ask for the folder's lock: in this process one after another
        self._last_use = 0
        try:
            self._workspace = Workspace(self.root / "incoming")
            self._arriving = self.root / "arriving"
            self._arriving.mkdir(exist_ok=True)
            remove_abandoned(self._arriving)
            self.index = RevisionIndex(self.root / "names", self._workspace)
            self._clear_up()
        except OSError as error:
            raise ConfigurationError(
                f"--disk-cache: {self.root} cannot be used: {error.strerror or error}; name a writable folder"
            ) from error

    def __len__(self) -> int:
        return len(self._books)

    @property
    def used_bytes(self) -> int:
        """Bytes of the revisions that this process knows to be here."""
        return self._books.used_bytes

    def folder_of(self, revision: str) -> Path:
        """Where a revision's files lie if they are here."""
        return self.root / revision.removeprefix(REVISION_PREFIX)

    async def get(self, revision: str) -> Path | None:
        """The folder of a revision, marked as just used; None when it is not here.

        A folder that this process has not written is digested first, in a thread; a corrupt one is removed.
        """
        entry = self._look_for(revision)
        if entry is None or not (entry.verified or await self._verify(revision, entry)):
            return None
        return self._mark_used(revision)

    def acquire(self, revision: str) -> bool:
        """Takes a lease: until `release` the folder stays, whichever process wants the room.

        False when the revision is not here (any more). Raises OSError when the process has too many files open.
        """
        entry = self._look_for(revision)
        if entry is None or not entry.verified:
            return False
        if not self._leases.take(revision, self.folder_of(revision), entry.found.inode):
            return False
        self._books.use(revision)
        self._mark_used(revision)
        return True

    def release(self, revision: str) -> None:
        """Gives a lease back."""
        if self._leases.give_back(revision):
            self._freed.set()

    @asynccontextmanager
    async def alone(self, download: str) -> AsyncIterator[None]:
        """Holds up every other process that begins the same download until the end of the block."""
        name = self._arriving / hashlib.sha256(download.encode()).hexdigest()
        async with AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(locked_name(name))
            except OSError as error:  # twice is better than not at all; a disk that is broken will tell
                log.warning("adapter_download_not_locked", error=str(error))
            yield

    @asynccontextmanager
    async def incoming(self, size: int) -> AsyncIterator[Path]:
        """An empty folder for `size` bytes, gone after the block unless `adopt` took it.

        Makes room first, waiting for leases to end where it must. Raises RequestFailed: `adapter_invalid`
        when the adapter is larger than the quota, `adapter_unavailable` when the disk is full.
        """
        if size > self.quota_bytes:
            raise RequestFailed(
                ErrorCode.ADAPTER_INVALID,
                f"the adapter's files hold {size} bytes, more than the {self.quota_bytes} of --disk-quota",
            )
        folder = await self._reserve(size)
        try:
            yield folder
        finally:
            if folder.exists():
                await in_thread(shutil.rmtree, folder, True)
            self._freed.set()

    async def adopt(self, folder: Path, files: Sequence[FileDigest]) -> str:
        """Moves a folder whose files have these digests into the tier; its revision. Raises OSError."""
        revision = revision_of(files)
        while True:
            try:
                async with self._lock():
                    os.rename(folder, self.folder_of(revision))
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                # Somebody wrote the same revision first; theirs is as good unless it turns out to be corrupt.
                if await self.get(revision) is not None:
                    return revision
            else:
                if (entry := self._look_for(revision)) is not None:
                    entry.verified = entry.is_new = True
                    self._mark_used(revision)
                return revision

    async def make_free(self, size: int) -> bool:
        """Evicts `size` bytes or what there is, for a disk that is full below the quota. False: there was nothing."""
        async with self._lock():
            self._books.see_all(await in_thread(survey, self.root, self._books.size_of))
            target = max(self.used_bytes - size, 0)
            discarded = self._evict_while(lambda: self.used_bytes > target)
            await in_thread(_remove, discarded)
        return bool(discarded)

    async def close(self) -> None:
        """Waits for digests still being made, removes this process's unfinished work and gives its leases back."""
        pending = [entry.verification for _, entry in self._books if entry.verification is not None]
        await asyncio.gather(*pending, return_exceptions=True)
        self._leases.close()
        self._workspace.close()

    def check_integrity(self) -> None:
        """Asserts that the books agree with each other and with the disk. For tests."""
        assert self.used_bytes == sum(entry.found.size for _, entry in self._books)
        assert self.used_bytes + reserved_bytes(self._workspace.parent) <= self.quota_bytes
        for revision, entry in self._books:
            assert folder_size(self.folder_of(revision)) == entry.found.size

    def _clear_up(self) -> None:
        """Finds what earlier processes left and brings it under the quota."""
        with locked_at_start(self.root):
            self._books.see_all(survey(self.root, self._books.size_of))
            discarded = self._evict_while(lambda: self.used_bytes > self.quota_bytes)
            self.index.prune({revision for revision, _ in self._books})
            _remove(discarded)

    @asynccontextmanager
    async def _lock(self) -> AsyncIterator[None]:
        async with self._turn, locked(self.root):
            yield

    async def _reserve(self, size: int) -> Path:
        """A folder in the workspace for `size` bytes, once there is room for it. Raises RequestFailed and OSError."""
        while True:
            self._freed.clear()
            async with self._lock():
                found = await in_thread(survey, self.root, self._books.size_of)
                reserved = await in_thread(reserved_bytes, self._workspace.parent)
                self._books.see_all(found)
                room = self.quota_bytes - reserved - size
                discarded = self._evict_while(lambda: self.used_bytes > room)  # noqa: B023 (called here only)
                await in_thread(_remove, discarded)
                disk_full = shutil.disk_usage(self.root).free < reserved + size
                if self.used_bytes <= room and not disk_full:
                    return self._workspace.new_folder(size)
            if disk_full and await self.make_free(size):
                continue
            if disk_full and not reserved:  # else what others bring in can be evicted once it is here
                raise RequestFailed(ErrorCode.ADAPTER_UNAVAILABLE, "the disk of the adapter cache is full")
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._freed.wait(), POLL_SECONDS)

    def _look_for(self, revision: str) -> Entry | None:
        """The entry of a revision as it is on disk now."""
        if not is_revision(revision):
            return None
        return self._books.see(revision, look_at(self.folder_of(revision), revision, self._books.size_of))

    async def _verify(self, revision: str, entry: Entry) -> bool:
        """Digests a folder once, however many wait for it; a lock keeps it where it is meanwhile."""
        if entry.verification is None:
            entry.verification = asyncio.create_task(self._digest_and_judge(revision, entry))
        return await asyncio.shield(entry.verification)

    async def _digest_and_judge(self, revision: str, entry: Entry) -> bool:
        folder = self.folder_of(revision)
        if (descriptor := try_lock(folder, shared=True)) is None:
            entry.verification = None
            return False
        try:
            entry.verified = await in_thread(holds, folder, revision)
        finally:
            os.close(descriptor)
        if not entry.verified:
            log.warning("adapter_cache_corrupt", revision=revision)
            async with self._lock():
                discarded = [self._discard(revision)] if self._look_for(revision) is entry else []
                self._books.see(revision, None)
                await in_thread(_remove, discarded)
        return entry.verified

    def _evict_while(self, needed: Callable[[], bool]) -> list[Path]:
        """Moves revisions that nobody leases out of the tier, in the policy's order; where to. Needs the lock."""
        discarded: list[Path] = []
        claims: list[int] = []

        def may_go(revision: str) -> bool:
            if revision in self._leases or (claim := try_lock(self.folder_of(revision))) is None:
                return False
            claims.append(claim)
            return True

        try:
            while needed():
                if (revision := self._books.choose(may_go)) is None:
                    break
                self.evictions += 1
                log.info("adapter_evicted", tier="disk", revision=revision)
                discarded.append(self._discard(revision))
        finally:
            for claim in claims:
                os.close(claim)
        return discarded

    def _discard(self, revision: str) -> Path:
        """Moves a folder out of the tier in one step, so that nobody ever sees half of it."""
        discarded = self._workspace.new_path()
        os.rename(self.folder_of(revision), discarded)
        return discarded

    def _mark_used(self, revision: str) -> Path | None:
        """Marks a revision as just used, for all processes; None when it has gone."""
        folder = self.folder_of(revision)
        self._last_use = max(time.time_ns(), self._last_use + 1)
        try:
            os.utime(folder, ns=(self._last_use, self._last_use))
        except FileNotFoundError:
            self._books.see(revision, None)
            return None
        if self._books.get(revision) is not None:
            self._books.mark(revision, self._last_use)
        return folder


def _remove(folders: Iterable[Path]) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
