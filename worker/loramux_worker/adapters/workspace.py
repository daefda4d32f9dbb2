"""A process's own folder for unfinished work, which others clear away once the process is gone."""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

from loramux_worker.adapters.folder_locks import remove_abandoned, try_lock


class Workspace:
    """A locked folder below `parent`; a new workspace first removes those that nobody holds any more.

    Raises OSError when the folder cannot be written or the file system knows no locks.
    """

    def __init__(self, parent: Path) -> None:
        self.parent = parent
        parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(parent)
        self.folder, self._lock = _create_locked(parent)

    def new_folder(self, reserved_bytes: int = 0) -> Path:
        """A new, empty folder, whose name tells everybody how much it may come to hold. Raises OSError."""
        path = self.folder / f"{reserved_bytes}-{secrets.token_hex(8)}"
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


def reserved_bytes(parent: Path) -> int:
    """What the unfinished folders of all processes may come to hold; those of processes that are gone are removed."""
    remove_abandoned(parent)
    total = 0
    for workspace in parent.iterdir():
        try:
            sizes = (name.partition("-") for name in os.listdir(workspace))
            total += sum(int(size) for size, dash, _ in sizes if dash and size.isdecimal())
        except (FileNotFoundError, NotADirectoryError):
            continue  # its process has just ended
    return total


def _create_locked(parent: Path) -> tuple[Path, int | None]:
    while True:
        folder = parent / secrets.token_hex(8)
        folder.mkdir()
        # Between mkdir and the lock a starting neighbour may take the folder for an abandoned one.
        if (lock := try_lock(folder)) is not None:
            return folder, lock
