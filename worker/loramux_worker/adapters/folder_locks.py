"""Locks on folders, by which the processes of a host agree: `flock`, which the kernel drops when a process ends.

However it ends, kill -9 included, and whatever process-id namespaces they live in. All of these raise OSError when the
file system knows no locks.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

POLL_SECONDS = 0.01


def try_lock(folder: Path, *, shared: bool = False) -> int | None:
    """A descriptor that holds the folder's lock until it is closed.

    None when another holds it in a way that excludes this, or the folder is gone or has been replaced.
    """
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        if _is_at(descriptor, folder):
            return descriptor
    except BlockingIOError:
        pass
    except OSError:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


@contextmanager
def locked_at_start(folder: Path) -> Iterator[None]:
    """Waits for the lock of a folder, blocking the thread, and holds it until the end of the block."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@asynccontextmanager
async def locked(folder: Path) -> AsyncIterator[None]:
    """Waits for the lock of a folder and holds it until the end of the block."""
    while (descriptor := try_lock(folder)) is None:
        os.stat(folder)  # is it still there to be waited for?
        await asyncio.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        os.close(descriptor)


@asynccontextmanager
async def locked_name(folder: Path) -> AsyncIterator[None]:
    """The same for a folder that is there for its name alone, and only while somebody holds or awaits its lock."""
    while True:
        with contextlib.suppress(FileExistsError):
            os.mkdir(folder)
        if (descriptor := try_lock(folder)) is not None:
            break
        await asyncio.sleep(POLL_SECONDS)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.rmdir(folder)
        os.close(descriptor)


def remove_abandoned(parent: Path) -> None:
    """Removes the folders whose lock nobody holds."""
    for folder in parent.iterdir():
        if (lock := try_lock(folder)) is not None:
            shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)


def _is_at(descriptor: int, folder: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(folder))
    except (FileNotFoundError, NotADirectoryError):
        return False
