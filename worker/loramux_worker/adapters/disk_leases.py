"""Leases of a process on folders that several share: one shared lock a folder, however many hold the lease."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from loramux_worker.adapters.folder_locks import try_lock


@dataclass(slots=True)
class _Lease:
    descriptor: int
    inode: int
    count: int = 0


class DiskLeases:
    """Counted leases by revision. Each takes a file descriptor."""

    def __init__(self) -> None:
        self._leases: dict[str, _Lease] = {}

    def __contains__(self, revision: str) -> bool:
        return revision in self._leases

    def take(self, revision: str, folder: Path, inode: int) -> bool:
        """One more lease of a folder; False when it is just being evicted. Raises OSError: too many open files."""
        lease = self._leases.get(revision)
        if lease is None or lease.inode != inode:  # a corrupt folder is replaced even while it is leased
            if (descriptor := try_lock(folder, shared=True)) is None:
                return False
            if lease is None:
                lease = self._leases[revision] = _Lease(descriptor, inode)
            else:
                os.close(lease.descriptor)
                lease.descriptor, lease.inode = descriptor, inode
        lease.count += 1
        return True

    def give_back(self, revision: str) -> bool:
        """Ends one lease, unless `close` has; whether it was the folder's last."""
        if (lease := self._leases.get(revision)) is None:
            return False
        lease.count -= 1
        if lease.count:
            return False
        del self._leases[revision]
        os.close(lease.descriptor)
        return True

    def close(self) -> None:
        """Ends all."""
        for lease in self._leases.values():
            os.close(lease.descriptor)
        self._leases.clear()
