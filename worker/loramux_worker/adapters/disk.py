"""The disk tier: adapters as folders named by their content, least recently used first out.

    root/<sha256 hex>/      the files of one revision, complete from the moment the folder is there
    root/names/             which revision a place in the store held last (RevisionIndex)
    root/incoming/<random>/ one process's unfinished downloads (Workspace)

A folder's modification time is when it was last used, so the order survives a restart. Several processes may
share a root: each enforces the quota over the revisions that it has met itself.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import time
from collections import Counter, OrderedDict
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import structlog

from loramux_schemas import ErrorCode
from loramux_worker.adapters.revisions import (
    REVISION_PREFIX,
    FileDigest,
    RevisionIndex,
    digest_folder,
    is_revision,
    revision_of,
)
from loramux_worker.adapters.workspace import Workspace
from loramux_worker.errors import ConfigurationError, RequestFailed

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Entry:
    """A revision on disk. `verified`: its bytes were written or digested by this process."""

    size: int
    verified: bool = False
    verification: asyncio.Task[bool] | None = None


class DiskTier:
    """Adapters under `root`, at most `quota_bytes` of them; what is leased is never deleted.

    Raises ConfigurationError, naming the setting, for a folder that cannot be used and a quota that is none.
    Everything but the constructor belongs to one event loop.
    """

    def __init__(self, root: str | Path, quota_bytes: int) -> None:
        if quota_bytes <= 0:
            raise ConfigurationError("--disk-quota must be more than 0 bytes")
        self.root = Path(root).absolute()
        self.quota_bytes = quota_bytes
        self.used_bytes = 0
        self.evictions = 0
        self._reserved = 0
        self._entries: OrderedDict[str, _Entry] = OrderedDict()
        self._leases: Counter[str] = Counter()
        self._freed = asyncio.Event()
        self._last_use = 0
        try:
            self._workspace = Workspace(self.root / "incoming")
            self.index = RevisionIndex(self.root / "names", self._workspace)
            self._scan()
            self.index.prune(self._entries)
        except OSError as error:
            raise ConfigurationError(
                f"--disk-cache: {self.root} cannot be used: {error.strerror or error}; name a writable folder"
            ) from error

    def __len__(self) -> int:
        return len(self._entries)

    def folder_of(self, revision: str) -> Path:
        """Where a revision's files lie if they are here."""
        return self.root / revision.removeprefix(REVISION_PREFIX)

    async def get(self, revision: str) -> Path | None:
        """The folder of a revision, marked as just used; None when it is not here.

        A folder that this process has not written is digested first, in a thread; a corrupt one is removed.
        """
        entry = self._entries.get(revision) or self._discover(revision)
        if entry is None:
            return None
        if not entry.verified and not await self._verify(revision, entry):
            return None
        return self._touch(revision)

    def acquire(self, revision: str) -> bool:
        """Takes a lease: until `release` the folder stays. False when the revision is not here (any more)."""
        entry = self._entries.get(revision)
        if entry is None or not entry.verified or self._touch(revision) is None:
            return False
        self._leases[revision] += 1
        return True

    def release(self, revision: str) -> None:
        """Gives a lease back."""
        assert self._leases[revision] > 0, f"{revision} is not leased"
        self._leases[revision] -= 1
        if not self._leases[revision]:
            del self._leases[revision]
            self._freed.set()

    @asynccontextmanager
    async def incoming(self, size: int) -> AsyncIterator[Path]:
        """An empty folder for `size` bytes, gone after the block unless `adopt` took it.

        Makes room first, waiting for leases to end where it must. Raises RequestFailed: `adapter_invalid`
        when the adapter is larger than the quota, `adapter_unavailable` when the disk is full.
        """
        await self._make_room(size)
        self._reserved += size
        folder = None
        try:
            folder = self._workspace.new_folder()
            yield folder
        finally:
            self._reserved -= size
            self._freed.set()
            if folder is not None and folder.exists():
                await asyncio.to_thread(shutil.rmtree, folder, True)

    async def adopt(self, folder: Path, files: Sequence[FileDigest]) -> str:
        """Moves a folder whose files have these digests into the tier; its revision. Raises OSError."""
        revision = revision_of(files)
        while True:
            try:
                os.rename(folder, self.folder_of(revision))
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                # Somebody wrote the same revision first; theirs is as good unless it turns out to be corrupt.
                if await self.get(revision) is not None:
                    return revision
            else:
                self._add(revision, _Entry(sum(file.size for file in files), verified=True))
                self._touch(revision)
                return revision

    async def close(self) -> None:
        """Waits for digests still being made and removes this process's unfinished work."""
        pending = [entry.verification for entry in self._entries.values() if entry.verification is not None]
        await asyncio.gather(*pending, return_exceptions=True)
        self._workspace.close()

    def check_integrity(self) -> None:
        """Asserts that the books agree with each other and with the disk. For tests."""
        assert self.used_bytes == sum(entry.size for entry in self._entries.values())
        assert self.used_bytes + self._reserved <= self.quota_bytes
        assert all(self._leases.values())
        for revision, entry in self._entries.items():
            assert _folder_size(self.folder_of(revision)) == entry.size
        assert self._leases.keys() <= self._entries.keys()

    def _scan(self) -> None:
        """Finds what earlier processes left, the least recently used first, and brings it under the quota."""
        revisions = (REVISION_PREFIX + path.name for path in self.root.iterdir() if path.is_dir())
        found = [revision for revision in revisions if is_revision(revision)]
        for revision in sorted(found, key=lambda revision: self.folder_of(revision).stat().st_mtime_ns):
            self._discover(revision)
        while self.used_bytes > self.quota_bytes and (discarded := self._evict()):
            shutil.rmtree(discarded, ignore_errors=True)

    def _discover(self, revision: str) -> _Entry | None:
        if not is_revision(revision):
            return None
        try:
            size = _folder_size(self.folder_of(revision))
        except (FileNotFoundError, NotADirectoryError):
            return None
        entry = _Entry(size)
        self._add(revision, entry)
        return entry

    async def _verify(self, revision: str, entry: _Entry) -> bool:
        """Digests a folder once, however many wait for it; the lease keeps it where it is meanwhile."""
        if entry.verification is None:
            entry.verification = asyncio.create_task(self._digest_and_judge(revision, entry))
        return await asyncio.shield(entry.verification)

    async def _digest_and_judge(self, revision: str, entry: _Entry) -> bool:
        self._leases[revision] += 1
        try:
            entry.verified = await asyncio.to_thread(_holds, self.folder_of(revision), revision)
        finally:
            self.release(revision)
        if not entry.verified and self._entries.get(revision) is entry:
            log.warning("adapter_cache_corrupt", revision=revision)
            if (discarded := self._discard(revision)) is not None:
                await asyncio.to_thread(shutil.rmtree, discarded, True)
        return entry.verified

    async def _make_room(self, size: int) -> None:
        if size > self.quota_bytes:
            raise RequestFailed(
                ErrorCode.ADAPTER_INVALID,
                f"the adapter's files hold {size} bytes, more than the {self.quota_bytes} of --disk-quota",
            )
        while True:
            over_quota = self.used_bytes + self._reserved + size > self.quota_bytes
            disk_full = shutil.disk_usage(self.root).free < size
            if not over_quota and not disk_full:
                return
            if (discarded := self._evict()) is not None:
                await asyncio.to_thread(shutil.rmtree, discarded, True)
            elif disk_full:
                raise RequestFailed(ErrorCode.ADAPTER_UNAVAILABLE, "the disk of the adapter cache is full")
            else:
                self._freed.clear()
                await self._freed.wait()

    def _evict(self) -> Path | None:
        """Takes the least recently used folder that nobody leases out of the tier; where it was moved to."""
        for revision in self._entries:
            if revision not in self._leases:
                self.evictions += 1
                log.info("adapter_evicted", tier="disk", revision=revision, size=self._entries[revision].size)
                return self._discard(revision)
        return None

    def _discard(self, revision: str) -> Path:
        """Moves a folder out of the tier in one step, so that nobody ever sees half of it."""
        self._forget(revision)
        discarded = self._workspace.new_path()
        try:
            os.rename(self.folder_of(revision), discarded)
        except FileNotFoundError:
            log.debug("adapter_evicted_elsewhere", revision=revision)
        return discarded

    def _touch(self, revision: str) -> Path | None:
        """Marks a revision as just used; None, and forgotten, when another process has removed it."""
        folder = self.folder_of(revision)
        self._last_use = max(time.time_ns(), self._last_use + 1)
        try:
            os.utime(folder, ns=(self._last_use, self._last_use))
        except FileNotFoundError:
            self._forget(revision)
            return None
        self._entries.move_to_end(revision)
        return folder

    def _add(self, revision: str, entry: _Entry) -> None:
        self._forget(revision)
        self._entries[revision] = entry
        self.used_bytes += entry.size

    def _forget(self, revision: str) -> None:
        if (entry := self._entries.pop(revision, None)) is not None:
            self.used_bytes -= entry.size
            self._freed.set()


def _folder_size(folder: Path) -> int:
    with os.scandir(folder) as files:
        return sum(file.stat().st_size for file in files)


def _holds(folder: Path, revision: str) -> bool:
    """Whether the files in the folder are those of the revision; an unreadable one is not."""
    try:
        return revision_of(digest_folder(folder)) == revision
    except OSError:
        return False
