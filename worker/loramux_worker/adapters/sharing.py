"""Work that a thread shares with others that happen to be free."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from typing import TypeVar

T = TypeVar("T")


def share(work: Iterable[T], do: Callable[[T], object], helpers: Executor | None, most: int) -> None:
    """Do all of `work`, this thread and up to `most` threads of `helpers` taking what comes next.

    It ends when everything is done, and waits for no helper that is busy elsewhere. Raises what `do` raised first, once
    no thread works on any of it any longer.
    """
    left = deque(work)

    def take() -> None:
        while left:
            try:
                item = left.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                do(item)
            except BaseException:
                left.clear()
                raise

    others = [helpers.submit(take) for _ in range(min(most, len(left) - 1))] if helpers is not None else []
    try:
        take()
    finally:
        running = [other for other in others if not other.cancel()]
        errors = [error for other in running if (error := other.exception()) is not None]
    for error in errors:
        raise error
