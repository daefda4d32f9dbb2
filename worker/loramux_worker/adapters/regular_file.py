"""Opening the files of an adapter folder."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from loramux_schemas import ErrorCode
from loramux_worker.adapters.invalid import AdapterInvalid
from loramux_worker.errors import RequestFailed


def open_regular(folder: Path, name: str) -> BinaryIO:
    """Open `folder/name` for reading; a pipe, device or folder in its place never blocks or is read.

    Raises:
        AdapterInvalid: the folder is there, and has no regular file of that name.
        RequestFailed: `adapter_unavailable` when the disk fails or the folder is gone: nothing wrong with the adapter.
    """
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        if not folder.is_dir():
            raise RequestFailed(ErrorCode.ADAPTER_UNAVAILABLE, "the adapter's files left the disk tier") from None
        raise AdapterInvalid(f"{name} is missing") from None
    except OSError as error:
        raise unreadable(name, error) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AdapterInvalid(f"{name} is not a regular file")
    return open(descriptor, "rb")


def read_up_to(file: BinaryIO, num_bytes: int, name: str) -> bytes:
    """The next `num_bytes`, less at the end of the file. Raises RequestFailed like `open_regular`."""
    try:
        return file.read(num_bytes)
    except OSError as error:
        raise unreadable(name, error) from None


def unreadable(name: str, error: OSError) -> RequestFailed:
    """The error for a disk that fails while an adapter is read."""
    return RequestFailed(ErrorCode.ADAPTER_UNAVAILABLE, f"{name} cannot be read: {error.strerror or error}")
