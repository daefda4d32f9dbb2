"""Which requests are to be stopped, and how: those that run now at once, those to come when they come.

    with cancellations.scope("r-1"):     # RequestFailed (`cancelled`) out of here as soon as somebody cancels r-1
        …
    cancellations.cancel("r-1", time.time())

Knows no Kafka: `kafka.control` reads the messages.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Protocol

from loramux_schemas import ErrorCode
from loramux_worker.errors import RequestFailed

MAX_REMEMBERED: Final = 100_000  # some 200 bytes each


class Cancellable(Protocol):
    """What waits to be told that its request is cancelled."""

    def cancel(self) -> None:
        """Somebody cancelled the request."""


class Cancellations:
    """Cancelled request ids, remembered for `memory` seconds but no more than `max_remembered` of them.

    An id that was cancelled stays so for that time: a message is cancelled whether its worker reads it before
    the cancellation or after. Belongs to one event loop; `clock` is Unix time in seconds.
    """

    def __init__(
        self, memory: float, *, max_remembered: int = MAX_REMEMBERED, clock: Callable[[], float] = time.time
    ) -> None:
        self._memory = memory
        self._max_remembered = max_remembered
        self._clock = clock
        self._expiries: OrderedDict[str, float] = OrderedDict()  # by request_id, the latest cancellation last
        self._scopes: dict[str, set[Cancellable]] = {}

    def __len__(self) -> int:
        """How many ids are remembered."""
        return len(self._expiries)

    def __contains__(self, request_id: str) -> bool:
        """Whether a request of this id is to be stopped."""
        return self._expiries.get(request_id, 0.0) > self._clock()

    def cancel(self, request_id: str, at: float) -> None:
        """Somebody cancelled a request, at Unix time `at` in seconds."""
        now = self._clock()
        expiry = min(at, now) + self._memory
        self._expiries[request_id] = max(expiry, self._expiries.pop(request_id, 0.0))
        self._trim(now)
        if request_id in self:
            for scope in tuple(self._scopes.get(request_id, ())):  # they may leave
                scope.cancel()

    def scope(self, request_id: str) -> Scope:
        """A block in which the current task works on this request."""
        return Scope(self, request_id)

    def enter(self, request_id: str, scope: Cancellable) -> None:
        """A scope begins. Raises RequestFailed if the request has been cancelled."""
        if request_id in self:
            raise _cancelled()
        self._scopes.setdefault(request_id, set()).add(scope)

    def leave(self, request_id: str, scope: Cancellable) -> None:
        """A scope ends."""
        scopes = self._scopes[request_id]
        scopes.remove(scope)
        if not scopes:
            del self._scopes[request_id]

    def _trim(self, now: float) -> None:
        # Partitions are read one beside another, so the order is nearly that of time: what an older one hides
        # behind a younger goes a little later.
        while self._expiries and (
            len(self._expiries) > self._max_remembered or next(iter(self._expiries.values())) <= now
        ):
            self._expiries.popitem(last=False)


class Scope:
    """The work of one task on one request: cancelled from outside, it ends as RequestFailed.

    A cancellation of the task itself passes through, as with `asyncio.timeout`.
    """

    def __init__(self, cancellations: Cancellations, request_id: str) -> None:
        self._cancellations = cancellations
        self._request_id = request_id
        self._task: asyncio.Task[Any] | None = None
        self._cancelling = 0
        self._is_cancelled = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None, "a request is worked on in a task"
        self._cancellations.enter(self._request_id, self)
        self._task, self._cancelling = task, task.cancelling()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._cancellations.leave(self._request_id, self)
        assert self._task is not None
        if self._is_cancelled and self._task.uncancel() <= self._cancelling and kind is asyncio.CancelledError:
            raise _cancelled() from None

    def cancel(self) -> None:
        """End the work, once."""
        assert self._task is not None
        if not self._is_cancelled:
            self._is_cancelled = True
            self._task.cancel()


def _cancelled() -> RequestFailed:
    return RequestFailed(ErrorCode.CANCELLED, "the request was cancelled")
