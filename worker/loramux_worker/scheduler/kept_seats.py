"""Seats that are kept free for adapters that have few."""

from __future__ import annotations

import math

_PART, _MOST = 8, 8  # one seat in so many at most, and so many
_STEPS = 64  # that the average goes over
_LEAST_RATE = 0.02  # a step; less is nothing


class KeptSeats:
    """How many of `num_seats` only those may take who have less than their share: twice as many as such come in a step.

    Fair order says who is next, but not when there is a next: where one adapter has filled the batch, all its sequences
    may have begun together and end together, and whoever comes meanwhile waits for that. So who has more than an equal
    share of the seats does not get the last ones while others come, unless there are seats for all who wait. An adapter
    that is alone gets all.
    """

    def __init__(self, num_seats: int) -> None:
        self._num_seats = num_seats
        self._most = min(_MOST, num_seats // _PART)
        self._rate = 0.0  # of those who come with less than their share, a step: an exponential average
        self._came = 0

    @property
    def number(self) -> int:
        """Seats that are kept."""
        return min(self._most, math.ceil(2 * self._rate)) if self._rate >= _LEAST_RATE else 0

    def may_take(self, has: int, others: int, free: int, waiting: int) -> bool:
        """Whether one of the `free` seats is for a client that has so many, beside so many other clients.

        `waiting`: sequences that have none yet.
        """
        return free > self.number or waiting <= free or self._has_less(has, others)

    def tick(self) -> None:
        """A step begins."""
        self._rate += (self._came - self._rate) / _STEPS
        self._came = 0

    def taken(self, has: int, others: int) -> None:
        """A client took one beside those that it had."""
        self._came += others > 0 and self._has_less(has, others)

    def _has_less(self, has: int, others: int) -> bool:
        return has * (others + 1) < self._num_seats
