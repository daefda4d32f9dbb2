"""What a process knows of the disk tier's folder: entries, bytes and who leaves first. No disk is touched here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from loramux_worker.adapters.disk_survey import Found
from loramux_worker.adapters.eviction import S3Fifo


@dataclass(slots=True, eq=False)
class Entry:
    """A revision on disk. `verified`: its bytes were written or digested by this process. `is_new`: not leased yet."""

    found: Found
    verified: bool = False
    is_new: bool = False
    verification: asyncio.Task[bool] | None = None


class DiskBooks:
    """Entries by revision, kept like what was last seen on disk; the policy counts the uses of all processes."""

    def __init__(self, capacity_bytes: int) -> None:
        self.used_bytes = 0
        self._entries: dict[str, Entry] = {}
        self._policy: S3Fifo[str] = S3Fifo(capacity_bytes)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[tuple[str, Entry]]:
        return iter(self._entries.items())

    def get(self, revision: str) -> Entry | None:
        """What is known of a revision."""
        return self._entries.get(revision)

    def size_of(self, revision: str, inode: int) -> int | None:
        """The bytes of a folder that has been counted before: a revision's files never change."""
        entry = self._entries.get(revision)
        return entry.found.size if entry is not None and entry.found.inode == inode else None

    def see(self, revision: str, found: Found | None) -> Entry | None:
        """Takes note of how a revision's folder is now; None when it is gone."""
        entry = self._entries.get(revision)
        if entry is not None and (found is None or found.inode != entry.found.inode):
            self._policy.remove(revision)
            self.drop(revision)
            entry = None
        if found is None:
            return None
        if entry is None:
            entry = self._entries[revision] = Entry(found)
            self.used_bytes += found.size
            self._policy.add(revision, found.size)
        elif found.used_at > entry.found.used_at:  # by another process
            entry.found = found
            self._policy.touch(revision)
        return entry

    def see_all(self, found: dict[str, Found]) -> None:
        """Takes note of all that is on disk, the least recently used first, and of what is no longer."""
        for revision in [revision for revision in self._entries if revision not in found]:
            self.see(revision, None)
        for revision, folder in found.items():
            self.see(revision, folder)

    def use(self, revision: str) -> None:
        """A revision was leased. The first time is what it came for: only the next one is another use of it."""
        entry = self._entries[revision]
        if entry.is_new:
            entry.is_new = False
        else:
            self._policy.touch(revision)

    def mark(self, revision: str, used_at: int) -> None:
        """This process has set a folder's time of use."""
        entry = self._entries[revision]
        entry.found = entry.found._replace(used_at=used_at)

    def choose(self, may_go: Callable[[str], bool]) -> str | None:
        """The revision that leaves first of those that may, out of the books now; None when none may."""
        revision = self._policy.evict(may_go)
        if revision is not None:
            self.drop(revision)
        return revision

    def drop(self, revision: str) -> None:
        """Forgets a revision that the policy has forgotten."""
        self.used_bytes -= self._entries.pop(revision).found.size
