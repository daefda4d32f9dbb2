"""A bound on the processor time of Python code that somebody else wrote, in a thread that cannot be killed."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class OutOfTime(BaseException):
    """The time is up. No `Exception`, so that nothing inside the code can catch it and go on."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the block once this thread has computed for `seconds` in the functions called from it.

    The interpreter looks at each line: what one line does inside C, such as sorting, runs to its end.
    """
    if math.isinf(seconds):
        yield
        return
    until = time.thread_time() + seconds

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        if time.thread_time() > until:
            raise OutOfTime
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield
    finally:
        sys.settrace(before)
