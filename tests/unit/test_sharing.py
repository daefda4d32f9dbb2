"""Work that is shared with threads that happen to be free."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from loramux_worker.adapters.sharing import share


@pytest.fixture
def helpers() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(2) as threads:
        yield threads


@pytest.mark.parametrize("count", [0, 1, 2, 50])
def test_each_is_done_once(helpers: ThreadPoolExecutor, count: int) -> None:
    for threads in (None, helpers):
        done: list[int] = []
        share(range(count), done.append, threads, 3)
        assert sorted(done) == list(range(count))


def test_helpers_take_part(helpers: ThreadPoolExecutor) -> None:
    together = threading.Barrier(3, timeout=10)
    share(range(3), lambda item: together.wait(), helpers, 2)


def test_busy_helpers_are_not_waited_for(helpers: ThreadPoolExecutor) -> None:
    free = threading.Event()
    busy = [helpers.submit(free.wait, 10) for _ in range(2)]
    done: list[int] = []
    share(range(5), done.append, helpers, 2)
    assert done == list(range(5))
    free.set()
    assert all(future.result() for future in busy)


@pytest.mark.parametrize("threads", [True, False])
def test_what_fails_is_raised_when_nobody_works_any_longer(helpers: ThreadPoolExecutor, threads: bool) -> None:
    working: set[int] = set()

    def do(item: int) -> None:
        working.add(item)
        try:
            if item == 3:
                raise ValueError("three")
        finally:
            working.remove(item)

    with pytest.raises(ValueError, match="three"):
        share(range(100), do, helpers if threads else None, 2)
    assert not working
