"""What lies in the disk tier's folder, whoever put it there."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from loramux_worker.adapters.revisions import REVISION_PREFIX, digest_folder, is_revision, revision_of


class Found(NamedTuple):
    """A revision's folder: its inode, when any process last used it (ns since the epoch) and its bytes."""

    inode: int
    used_at: int
    size: int


def survey(root: Path, size_of: Callable[[str, int], int | None]) -> dict[str, Found]:
    """All revisions, the least recently used first. `size_of(revision, inode)` spares counting what is known."""
    found = {}
    with os.scandir(root) as entries:
        for entry in entries:
            revision = REVISION_PREFIX + entry.name
            if is_revision(revision) and (folder := look_at(Path(entry.path), revision, size_of)) is not None:
                found[revision] = folder
    return dict(sorted(found.items(), key=lambda item: item[1].used_at))


def look_at(folder: Path, revision: str, size_of: Callable[[str, int], int | None]) -> Found | None:
    """One folder; None when there is none."""
    try:
        status = os.stat(folder)
        size = size_of(revision, status.st_ino)
        return Found(status.st_ino, status.st_mtime_ns, folder_size(folder) if size is None else size)
    except (FileNotFoundError, NotADirectoryError):
        return None


def folder_size(folder: Path) -> int:
    """Bytes of the files directly in a folder. Raises OSError."""
    with os.scandir(folder) as files:
        return sum(file.stat().st_size for file in files)


def is_full(error: OSError) -> bool:
    """Whether a disk, or a user's share of it, has no room left."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def holds(folder: Path, revision: str) -> bool:
    """Whether the files in the folder are those of the revision; an unreadable one is not."""
    try:
        return revision_of(digest_folder(folder)) == revision
    except OSError:
        return False
