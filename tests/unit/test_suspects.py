"""Sequences that engines die of are found, and no others are given up."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st

from loramux_worker.engine.protocol import SamplingParameters, SequenceOutput, Submit
from loramux_worker.generation import Generation
from loramux_worker.suspects import HARMLESS_TOKENS, MAX_DEATHS, Suspects

LENGTH = 200


@dataclass
class Engine:
    """Gives every sequence that is in it a token a step; dies of those that `fatal_at` names, at that token."""

    fatal_at: dict[int, int]
    generations: dict[int, Generation]
    suspects: Suspects = field(default_factory=Suspects)
    deaths: int = 0
    given_up: list[int] = field(default_factory=list)

    def run(self) -> None:
        """Until nothing is left; checks that no more than one suspect is let in at a time."""
        while self.generations:
            inside = {each.sequence_id for each in self.generations.values() if each not in self.suspects}
            while self._step(inside):
                if (suspect := self.suspects.let_in()) is not None:
                    assert suspect.sequence_id not in inside
                    inside.add(suspect.sequence_id)
                    assert self.suspects.let_in() is None

    def _step(self, inside: set[int]) -> bool:
        """False when the engine has died or nothing is left."""
        for number in sorted(inside):
            generation = self.generations[number]
            if len(generation.token_ids) == self.fatal_at.get(number):
                self._die()
                return False
        for number in sorted(inside):
            generation = self.generations[number]
            last = len(generation.token_ids) == LENGTH - 1
            generation.add(SequenceOutput(number, 0, "length" if last else None))
            if last:
                del self.generations[number]
                inside.discard(number)
            self.suspects.heard_of(generation)
        return bool(self.generations)

    def _die(self) -> None:
        self.deaths += 1
        culprit = self.suspects.engine_died(self.generations.values())
        if culprit is not None:
            self.given_up.append(culprit.sequence_id)
            del self.generations[culprit.sequence_id]


def some(count: int) -> dict[int, Generation]:
    return {i: Generation(Submit(i, [1], SamplingParameters(max_new_tokens=LENGTH))) for i in range(count)}


@given(st.integers(1, 12), st.integers(0, 11), st.integers(0, LENGTH - 1))
def test_the_deadly_one_is_given_up_and_nobody_else(count: int, deadly: int, at: int) -> None:
    engine = Engine({deadly % count: at}, some(count))
    engine.run()
    assert engine.given_up == [deadly % count]
    assert engine.deaths == MAX_DEATHS


@given(st.integers(1, 12), st.dictionaries(st.integers(0, 11), st.integers(0, LENGTH - 1), max_size=3))
def test_several_deadly_ones_are_given_up_too(count: int, fatal_at: dict[int, int]) -> None:
    """Of two that are deadly at different places, one may die while a third is let in."""
    fatal_at = {number: at for number, at in fatal_at.items() if number < count}
    engine = Engine(fatal_at, some(count))
    engine.run()
    assert set(engine.given_up) >= fatal_at.keys()
    assert engine.deaths <= 2 * MAX_DEATHS * max(1, len(fatal_at))


def test_one_that_is_deadly_again_and_again_later_on_does_not_kill_for_ever() -> None:
    """Each time it is cleared it has to go further: the deaths grow as the logarithm of its length."""
    [generation] = some(1).values()
    suspects, deaths = Suspects(), 0
    for position in range(0, 100_000, HARMLESS_TOKENS + 1):
        generation.token_ids = [0] * position
        suspects.heard_of(generation)
        deaths += 1
        if suspects.engine_died([generation]) is not None:
            break
        suspects.let_in()
    assert deaths == MAX_DEATHS + 1


def test_a_suspect_that_is_cancelled_makes_room() -> None:
    first, second = some(2).values()
    suspects = Suspects()
    for _ in range(MAX_DEATHS - 1):
        assert suspects.engine_died([first, second]) is None
    assert first in suspects
    assert suspects.let_in() is first
    assert first not in suspects
    assert suspects.let_in() is None
    suspects.forget(first)
    assert suspects.let_in() is second
