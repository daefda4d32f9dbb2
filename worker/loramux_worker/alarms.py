"""What may not go on waiting: parked requests that were cancelled, or whose deadline has passed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from typing import Final

from loramux_worker.cancellations import Cancellations
from loramux_worker.glance import Glanced

LONGEST: Final = 86_400.0  # seconds; a timer for later than that is not worth its place


class Alarms:
    """Calls `ring` with a request as soon as it is cancelled or late, until `disarm`. Belongs to one event loop."""

    def __init__(self, cancellations: Cancellations, ring: Callable[[Glanced], None]) -> None:
        self._cancellations = cancellations
        self._ring = ring
        self._alarms: dict[Glanced, _Alarm] = {}

    def __len__(self) -> int:
        """Requests that are watched."""
        return len(self._alarms)

    def arm(self, request: Glanced) -> None:
        """Watch a request; one that is cancelled or late already rings at once."""
        request_id = request.request_id
        seconds = LONGEST if request.deadline is None else request.deadline - time.time()
        if seconds <= 0 or (request_id is not None and request_id in self._cancellations):
            self._ring(request)
            return
        alarm = self._alarms[request] = _Alarm(self._ring, request)
        if request_id is not None:
            self._cancellations.enter(request_id, alarm)
        if seconds < LONGEST:
            alarm.timer = asyncio.get_running_loop().call_later(seconds, alarm.cancel)

    def disarm(self, requests: Iterable[Glanced]) -> None:
        """Watch these no longer; it does not matter if nobody did."""
        for request in requests:
            alarm = self._alarms.pop(request, None)
            if alarm is None:
                continue
            if request.request_id is not None:
                self._cancellations.leave(request.request_id, alarm)
            if alarm.timer is not None:
                alarm.timer.cancel()


class _Alarm:
    def __init__(self, ring: Callable[[Glanced], None], request: Glanced) -> None:
        self._ring = ring
        self._request = request
        self.timer: asyncio.TimerHandle | None = None

    def cancel(self) -> None:
        self._ring(self._request)
