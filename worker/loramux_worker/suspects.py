"""Who it is that engines die of.

A dying engine does not say which of its sequences it died of. Those that two engines died with are let into the next
one by one, beside whatever else runs: each goes on until it is well past the place where it stood. The engine that
dies meanwhile has died of the one that was let in last, and nobody else is given up. (Two that are deadly at different
places can still cost a third one its answer.)
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from loramux_worker.generation import Generation

MAX_DEATHS: Final = 3  # engines that one sequence may take down before it is given up
HARMLESS_TOKENS: Final = 32  # that clear a suspect; twice as many the next time


class Suspects:
    """The sequences of one engine that wait to be let in, and the one that was."""

    def __init__(self) -> None:
        self._waiting: dict[int, Generation] = {}
        self._tried: Generation | None = None
        self._harmless_at = 0

    def __contains__(self, generation: Generation) -> bool:
        """Whether it has to wait."""
        return generation.sequence_id in self._waiting

    def engine_died(self, in_flight: Iterable[Generation]) -> Generation | None:
        """Takes note of a death among these; returns the one to give up, if there is one."""
        culprit, self._tried = self._tried, None
        if culprit is None:
            for generation in in_flight:
                generation.engine_deaths += 1
                if generation.engine_deaths >= MAX_DEATHS - 1:
                    self._waiting[generation.sequence_id] = generation
        return culprit

    def let_in(self) -> Generation | None:
        """The next one for the engine, if it is time."""
        if self._tried is not None or not self._waiting:
            return None
        tried = self._tried = self._waiting.pop(next(iter(self._waiting)))
        patience = HARMLESS_TOKENS << (tried.engine_deaths - MAX_DEATHS + 1)
        self._harmless_at = len(tried.token_ids) + patience
        return tried

    def heard_of(self, generation: Generation) -> None:
        """It has more tokens, or its last."""
        if generation is self._tried and (generation.is_done or len(generation.token_ids) >= self._harmless_at):
            self._tried = None

    def forget(self, generation: Generation) -> None:
        """It is gone."""
        self._waiting.pop(generation.sequence_id, None)
        if generation is self._tried:
            self._tried = None
