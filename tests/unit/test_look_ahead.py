"""The window of seats and parked requests: bounds, order, nobody forgotten, seats not left free without a reason."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loramux_worker.glance import OVERHEAD, UNREADABLE, Glanced, glance
from loramux_worker.kafka.records import Record
from loramux_worker.look_ahead import MOST_AT_ONCE, Window

LIGHT = tuple(f"light-{i}" for i in range(20))


def record(value: bytes | None, offset: int = 0, partition: int = 0, key: bytes | None = None) -> Record:
    return Record("requests", partition, offset, key, value, (), 0, epoch=1)


def request(adapter_id: str | None, offset: int = 0, partition: int = 0, priority: int = 0, size: int = 0) -> Glanced:
    return Glanced(record(b"x" * size, offset, partition), adapter_id, None, priority, None)


def started(window: Window) -> list[Glanced]:
    """All that has a seat now and had none before."""
    requests = []
    while (each := window.start()) is not None:
        requests.append(each)
    return requests


def test_a_flood_hides_nobody_who_stands_behind_it() -> None:
    window = Window(1024, 0.75, 8192, 64 << 20)
    for offset in range(5000):
        window.park(request("flood", offset))
    flood = started(window)
    assert len(flood) == pytest.approx(0.75 * 1024, abs=1)
    for offset, adapter_id in enumerate(LIGHT, 5000):
        window.park(request(adapter_id, offset))
    assert [each.adapter_id for each in started(window)] == list(LIGHT)
    window.finish(flood[0])
    assert started(window) == [], "the light ones have its seats now"


@pytest.mark.parametrize("number", [1, 2, 5, 30])
def test_adapters_that_flood_share_the_seats_alike(number: int) -> None:
    window = Window(1000, 0.75, 100_000, 1 << 30)
    for offset in range(1500 * number):
        window.park(request(f"flood-{offset % number}", offset))
    counts = Counter(each.adapter_id for each in started(window))
    expected = 1000 * 3 * number / (3 * number + 1)
    assert window.in_hand == pytest.approx(expected, abs=number)
    assert max(counts.values()) - min(counts.values()) <= 1
    assert window.in_hand < 1000, "somebody new finds a seat"


def test_more_adapters_than_seats_take_turns() -> None:
    window = Window(4, 0.75, 1000, 1 << 20)
    for offset in range(60):
        window.park(request(f"adapter-{offset % 20}", offset))
    order = []
    hand = started(window)
    while hand:
        first = hand.pop(0)
        order.append(first.adapter_id)
        window.finish(first)
        hand += started(window)
    assert order == [f"adapter-{i % 20}" for i in range(60)]


def test_within_an_adapter_priority_goes_first_and_equals_as_they_came() -> None:
    window = Window(1, 0.75, 100, 1 << 20)
    for offset, priority in enumerate([0, 5, 0, 5, -1]):
        window.park(request("a", offset, priority=priority))
    offsets = []
    while (each := window.start()) is not None:
        offsets.append(each.record.offset)
        window.finish(each)
    assert offsets == [1, 3, 0, 2, 4]


def test_a_partition_that_filled_its_share_of_the_parking_room_is_not_read_and_others_are() -> None:
    window = Window(1, 0.75, 100, 1 << 20)
    for offset in range(76):
        window.park(request("flood", offset, partition=3))
    window.park(request("other", 0, partition=1))
    assert window.full_partitions == {3}
    assert window.room == 23
    window.clear()
    assert window.full_partitions == frozenset()


def test_bytes_fill_the_parking_room_too() -> None:
    window = Window(1, 0.75, 1000, 10 * OVERHEAD)
    window.park(request("a", 0, partition=2, size=8 * OVERHEAD))
    assert window.full_partitions == {2}
    assert window.room == MOST_AT_ONCE
    window.park(request("a", 1, partition=1, size=0))
    assert window.room == 0
    assert window.start() is not None, "one that is larger than all the room would start as well"
    assert window.room > 0


def test_one_seat_is_enough() -> None:
    window = Window(1, 0.01, 1, 1)
    window.park(request("a", size=100))
    assert window.room == 0
    assert window.start() is not None
    assert window.room == 1


@pytest.mark.parametrize(
    ("value", "adapter_id"),
    [
        ({"request_id": "r", "prompt": "x"}, None),
        ({"request_id": "r", "prompt": "x", "adapter_id": None}, None),
        ({"request_id": "r", "prompt": "x", "adapter_id": "acme/support"}, "acme/support"),
        ({"request_id": "r", "adapter_id": "acme/support@sha256:12", "anything": {"adapter_id": 7}}, "acme/support"),
        ({"request_id": "r", "adapter_id": 7}, UNREADABLE),
        ([1, 2], UNREADABLE),
    ],
)
def test_the_adapter_is_read_from_the_value_whatever_the_key(value: object, adapter_id: str | None) -> None:
    glanced = glance(record(json.dumps(value).encode(), key=b"a user's number"))
    assert glanced.adapter_id == adapter_id


def test_a_glance_finds_what_could_end_the_waiting() -> None:
    value = {"request_id": "r-1", "adapter_id": "a", "priority": 3, "deadline_ms": 1500, "prompt": "x" * 50}
    glanced = glance(record(json.dumps(value).encode()))
    assert (glanced.request_id, glanced.priority, glanced.deadline) == ("r-1", 3, 1.5)
    assert glanced.size > 50


@settings(deadline=None)
@given(
    st.none()
    | st.binary(max_size=60)
    | st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b'{"request_id":"\\ud800"}'])
)
def test_a_glance_at_anything_raises_nothing(value: bytes | None) -> None:
    assert glance(record(value)).record.value == value


class Looking(RuleBasedStateMachine):
    """Requests are read, start, end, are withdrawn and lost, in any order."""

    @initialize(seats=st.integers(1, 12), share=st.sampled_from([0.1, 0.5, 0.75, 0.9]), max_parked=st.integers(1, 30))
    def begin(self, seats: int, share: float, max_parked: int) -> None:
        self.seats, self.share, self.max_parked = seats, share, max_parked
        self.window = Window(seats, share, max_parked, 20 * OVERHEAD)
        self.parked: list[Glanced] = []
        self.hand: list[Glanced] = []
        self.overtaken: dict[str | None, Counter[str | None]] = {}  # of those who wait with nothing in hand
        self.offset = 0

    @rule(
        adapters=st.lists(st.sampled_from(["flood", "flood", "flood", "a", "b", "c", None]), max_size=8),
        partition=st.integers(0, 2),
        priority=st.integers(0, 1),
        size=st.sampled_from([0, 0, 0, 3000]),
    )
    def read(self, adapters: list[str | None], partition: int, priority: int, size: int) -> None:
        if partition in self.window.full_partitions:
            return
        for adapter_id in adapters[: self.window.room]:
            each = request(adapter_id, self.offset, partition, priority, size)
            self.offset += 1
            self.window.park(each)
            self.parked.append(each)
        self.start()

    def start(self) -> None:
        while (each := self.window.start()) is not None:
            own = [other for other in self.parked if other.adapter_id == each.adapter_id]
            assert each is min(own, key=lambda other: (-other.priority, other.record.offset)), "order in the adapter"
            self.parked.remove(each)
            self.hand.append(each)
            self.note_start(each.adapter_id)

    def note_start(self, adapter_id: str | None) -> None:
        """Whoever has nothing in hand is overtaken by each of the others once at most."""
        self.overtaken.pop(adapter_id, None)
        for waiting in {each.adapter_id for each in self.parked} - {each.adapter_id for each in self.hand}:
            overtakers = self.overtaken.setdefault(waiting, Counter())
            overtakers[adapter_id] += 1
            assert overtakers[adapter_id] <= 1, "nobody goes twice before one who waits with nothing in hand"

    @precondition(lambda self: self.hand)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        self.window.finish(self.hand.pop(data.draw(st.integers(0, len(self.hand) - 1))))
        self.start()

    @precondition(lambda self: self.parked)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        each = self.parked.pop(data.draw(st.integers(0, len(self.parked) - 1)))
        assert self.window.withdraw(each)
        assert not self.window.withdraw(each)
        self.forget_the_gone()

    @rule(partition=st.integers(0, 2))
    def lose(self, partition: int) -> None:
        lost = {each for each in self.parked if each.record.partition == partition}
        assert set(self.window.lose({(partition, 1), (partition, 7)})) == lost
        self.parked = [each for each in self.parked if each not in lost]
        self.forget_the_gone()

    def forget_the_gone(self) -> None:
        waiting = {each.adapter_id for each in self.parked}
        self.overtaken = {name: counts for name, counts in self.overtaken.items() if name in waiting}

    @invariant()
    def everything_is_accounted_for(self) -> None:
        if not hasattr(self, "window"):
            return
        self.window.check_integrity()
        assert set(self.window) == set(self.parked)
        assert self.window.in_hand == len(self.hand)
        assert self.window.parked <= self.max_parked
        assert self.window.room + self.window.parked <= self.max_parked

    @invariant()
    def seats_are_taken_while_anybody_waits(self) -> None:
        if hasattr(self, "window") and self.parked:
            assert len(self.hand) >= min(self.seats, self.share * self.seats - 1e-9)

    def teardown(self) -> None:
        """Whatever was read is worked on in the end, if what is in hand ends."""
        while hasattr(self, "window") and self.hand:
            self.window.finish(self.hand.pop(0))
            self.start()
        assert not getattr(self, "parked", None)


TestLooking = Looking.TestCase
TestLooking.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
