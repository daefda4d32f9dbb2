"""The offsets tracker against a plain model, and the commit metadata that carries its state over a restart."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loramux_worker.kafka.metadata import MAX_CHARACTERS, MAX_WINDOW, decode, encode
from loramux_worker.kafka.tracker import Admission, OffsetsTracker


class TrackerMachine(RuleBasedStateMachine):
    """A partition with gaps, polled in order and answered in any order, over restarts.

    The model knows every offset that holds a request (the gaps are markers and compacted records) and which of
    them were answered; the tracker has to agree on the watermark, and never to hand out an answered request again.
    """

    @initialize(
        start=st.integers(0, 1_000),
        window=st.integers(1, 64),
        gaps=st.lists(st.integers(1, 40), min_size=1, max_size=60),
    )
    def begin(self, start: int, window: int, gaps: list[int]) -> None:
        self.window = window
        self.log = [start + sum(gaps[: i + 1]) for i in range(len(gaps))]  # offsets that hold a request
        self.position = start  # the consumer's
        self.tracker = OffsetsTracker(start, max_window=window)
        self.answered: set[int] = set()
        self.handed_out: set[int] = set()  # since the last restart

    def unread(self) -> list[int]:
        return [offset for offset in self.log if offset >= self.position]

    @precondition(lambda self: self.unread() and not self.tracker.is_full)
    @rule(most=st.integers(1, 20))
    def poll(self, most: int) -> None:
        assert self.tracker.room >= 1
        for offset in self.unread()[:most]:
            admission = self.tracker.admit(offset)
            if admission is Admission.NO_ROOM:
                assert self.tracker.in_flight, "with nothing in flight every offset has room"
                assert self.tracker.is_full, "it is not asked for again before an answer comes"
                break
            self.position = offset + 1
            assert (admission is Admission.ANSWERED) == (offset in self.answered)
            if admission is Admission.NEW:
                self.handed_out.add(offset)

    @precondition(lambda self: self.unread() and not self.tracker.is_full and self.tracker.room > 1)
    @rule()
    def poll_within_room_is_never_refused_where_there_are_no_gaps(self) -> None:
        offset = self.unread()[0]
        if offset < self.tracker.next_position + self.tracker.room:
            assert self.tracker.admit(offset) is not Admission.NO_ROOM
            self.position = offset + 1
            if offset not in self.answered:
                self.handed_out.add(offset)

    @precondition(lambda self: self.handed_out)
    @rule(data=st.data())
    def poll_again(self, data: st.DataObject) -> None:
        """A seek back: what was seen is not handed out twice."""
        assert self.tracker.admit(data.draw(st.sampled_from(sorted(self.handed_out)))) is Admission.SEEN

    @precondition(lambda self: self.handed_out - self.answered)
    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        offset = data.draw(st.sampled_from(sorted(self.handed_out - self.answered)))
        assert self.tracker.done(offset)
        assert not self.tracker.done(offset), "an answer counts once"
        self.answered.add(offset)

    @precondition(lambda self: self.handed_out - self.answered)
    @rule(data=st.data())
    def say_beforehand(self, data: st.DataObject) -> None:
        """What a transaction says is what holds after it."""
        in_flight = sorted(self.handed_out - self.answered)
        soon = data.draw(st.sets(st.sampled_from(in_flight), min_size=1))
        position, above = self.tracker.commit(soon, idle_position=self.position + 3)
        for offset in soon:
            assert self.tracker.done(offset)
        self.answered |= soon
        after, above_after = self.tracker.commit(idle_position=self.position + 3)
        assert (position, sorted(above)) == (after, sorted(above_after))

    @rule(offset=st.integers(0, 3_000))
    def answer_what_is_not_in_flight(self, offset: int) -> None:
        if offset not in self.handed_out - self.answered:
            assert not self.tracker.done(offset)

    @rule(markers=st.integers(0, 30))
    def restart(self, markers: int) -> None:
        """A new process begins with nothing but what was committed; behind the newest record lie markers."""
        idle = self.position if self.unread() else self.position + markers
        position, answered = self.tracker.commit(idle_position=idle)
        metadata = encode(position, answered)
        assert position <= min(self.unanswered(), default=idle)
        self.tracker = OffsetsTracker(position, max_window=self.window, answered=decode(position, metadata))
        self.position = position
        self.handed_out = set()

    def unanswered(self) -> list[int]:
        return [offset for offset in self.log if offset not in self.answered]

    @invariant()
    def agrees_with_the_model(self) -> None:
        if not hasattr(self, "tracker"):
            return
        self.tracker.check_integrity()
        in_flight = self.handed_out - self.answered
        assert self.tracker.in_flight == len(in_flight)
        assert self.tracker.watermark == min(in_flight, default=self.tracker.next_position)
        below = {offset for offset in self.log if offset < self.tracker.watermark}
        assert below <= self.answered, "the watermark never passes an unanswered request"
        position, answered = self.tracker.commit()
        assert position == self.tracker.watermark
        assert set(answered) == {offset for offset in self.answered if offset >= position}
        if not in_flight:
            assert not self.tracker.is_full
            assert self.tracker.commit(idle_position=self.position + 7)[0] == self.position + 7


TrackerMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTracker = TrackerMachine.TestCase


def test_window_is_bounded_and_opens_again() -> None:
    tracker = OffsetsTracker(10, max_window=4)
    assert [tracker.admit(offset) for offset in (10, 11, 12, 13)] == [Admission.NEW] * 4
    assert tracker.is_full
    assert tracker.admit(14) is Admission.NO_ROOM
    tracker.done(11)
    assert tracker.is_full, "the head still waits"
    tracker.done(10)
    assert not tracker.is_full
    assert tracker.watermark == 12
    assert tracker.admit(14) is Admission.NEW


def test_a_gap_wider_than_the_window_waits_for_the_answers_before_it() -> None:
    tracker = OffsetsTracker(0, max_window=8)
    assert tracker.admit(0) is Admission.NEW
    assert tracker.admit(1_000_000) is Admission.NO_ROOM
    assert tracker.is_full
    assert tracker.next_position == 1
    tracker.done(0)
    assert not tracker.is_full
    assert tracker.admit(1_000_000) is Admission.NEW
    assert tracker.watermark == 1_000_000


def test_offsets_that_the_broker_deleted_are_left_behind() -> None:
    tracker = OffsetsTracker(0, max_window=8, answered=[4, 30])
    tracker.admit(0)
    tracker.skip_to(20)
    assert tracker.next_position == 20
    assert tracker.watermark == 0
    assert tracker.commit() == (0, [30])
    assert tracker.admit(20) is Admission.NO_ROOM
    tracker.done(0)
    assert tracker.admit(20) is Admission.NEW


@pytest.mark.parametrize("window", [0, -1, MAX_WINDOW + 1])
def test_a_window_that_cannot_be_committed_is_refused(window: int) -> None:
    with pytest.raises(ValueError, match="window"):
        OffsetsTracker(0, max_window=window)


@given(st.integers(0, 2**62), st.sets(st.integers(0, MAX_WINDOW - 1), max_size=200))
@settings(max_examples=150, deadline=None)
def test_metadata_round_trip(position: int, answered: set[int]) -> None:
    offsets = {position + each for each in answered}
    metadata = encode(position, offsets)
    assert len(metadata) <= MAX_CHARACTERS
    assert metadata.isascii()
    assert decode(position, metadata) == offsets


def test_metadata_of_a_full_window_fits() -> None:
    everything = range(77, 77 + MAX_WINDOW)
    metadata = encode(77, everything)
    assert len(metadata) <= MAX_CHARACTERS
    assert decode(77, metadata) == set(everything)
    assert encode(77, []) == ""


@pytest.mark.parametrize("offset", [76, 77 + MAX_WINDOW])
def test_metadata_refuses_offsets_outside_the_window(offset: int) -> None:
    with pytest.raises(ValueError, match="outside the window"):
        encode(77, [offset])


@pytest.mark.parametrize("metadata", ["é", "not ours: \x00", "0", "{}", encode(0, [3])[:-1] + " "])
def test_metadata_of_somebody_else_is_told_apart(metadata: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        decode(0, metadata)


@given(st.text(max_size=40))
@settings(max_examples=200, deadline=None)
def test_metadata_decoding_never_fails_in_another_way(metadata: str) -> None:
    with contextlib.suppress(ValueError):
        assert all(offset >= 5 for offset in decode(5, metadata))
