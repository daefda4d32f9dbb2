from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator

import pytest

from loramux_worker.text.time_limit import OutOfTime, time_limit


def spin() -> None:
    while True:
        pass


def spin_and_catch() -> None:
    while True:
        try:
            spin()
        except Exception:
            continue


def spin_in_a_generator() -> int:
    def numbers() -> Iterator[int]:
        while True:
            yield 1

    return sum(numbers())


@pytest.mark.parametrize("function", [spin, spin_and_catch, spin_in_a_generator])
def test_what_takes_too_long_ends(function: Callable[[], object]) -> None:
    before = sys.gettrace()
    started = time.thread_time()
    with pytest.raises(OutOfTime), time_limit(0.1):
        function()
    assert 0.1 <= time.thread_time() - started < 5
    assert sys.gettrace() is before


def test_what_is_quick_is_left_alone_and_so_is_waiting() -> None:
    before = sys.gettrace()
    with time_limit(0.05):
        assert sum(n for n in range(100)) == 4950
        time.sleep(0.1)
        assert len("".join(str(n) for n in range(10))) == 10
    assert sys.gettrace() is before
