"""What the commands print beside their results: progress of bytes on stderr, and sizes for people."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


class ByteProgress:
    """A bar whose length may grow while it runs. Both methods may be called from any thread."""

    def __init__(self, progress: Progress, task: TaskID) -> None:
        self._progress = progress
        self._task = task
        self._total = 0

    def expect(self, count: int) -> None:
        """So many more bytes will come."""
        self._total += count
        self._progress.update(self._task, total=self._total)

    def advance(self, count: int) -> None:
        """So many bytes are done."""
        self._progress.advance(self._task, count)

    def describe(self, text: str) -> None:
        """Say what the bar is about."""
        self._progress.update(self._task, description=text)


@contextmanager
def byte_progress(description: str) -> Iterator[ByteProgress]:
    """A bar on stderr, if that is a terminal; it goes away at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield ByteProgress(progress, progress.add_task(description, total=None))


def size_text(num_bytes: int) -> str:
    """`84.1 MiB`."""
    size = float(num_bytes)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
