"""A process's own folder for unfinished work, which others clear away once the process is gone."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from pathlib import Path


class Workspace:
    """A locked folder below `parent`.

    The kernel drops the lock (`flock` on the folder itself) when the process ends in any way, kill -9
    included, and other processes can see that whatever their process-id namespace is. So a new workspace
    first removes those that nobody holds. Raises OSError when the folder cannot be written or the file system
    knows no locks.
    """

    def __init__(self, parent: Path) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(parent)
        self.folder, self._lock = _create_locked(parent)

    def new_folder(self) -> Path:
        """A new, empty folder. Raises OSError."""
        path = self.new_path()
        path.mkdir()
        return path

    def new_path(self) -> Path:
        """A path inside the workspace at which nothing is."""
        return self.folder / secrets.token_hex(8)

    def close(self) -> None:
        """Removes the folder and what is in it; a second call does nothing."""
        if self._lock is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            os.close(self._lock)
            self._lock = None


def _create_locked(parent: Path) -> tuple[Path, int | None]:
    while True:
        folder = parent / secrets.token_hex(8)
        folder.mkdir()
        lock = _try_lock(folder)
        # Between mkdir and flock a starting neighbour may have taken the folder for an abandoned one.
        if lock is not None and folder.exists():
            return folder, lock
        if lock is not None:
            os.close(lock)


def _remove_abandoned(parent: Path) -> None:
    for folder in parent.iterdir():
        if (lock := _try_lock(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _try_lock(folder: Path) -> int | None:
    """A descriptor that holds the folder's lock; None when another process holds it or the folder is gone."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:
        os.close(descriptor)
        raise
    return descriptor
