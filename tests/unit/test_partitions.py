"""Shuffle sharding: balanced, stable when a topic grows, and the least loaded shard first."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loramux_producer.partitions import PartitionChooser, shard_partitions

adapters = st.text(min_size=1, max_size=40)
counts = st.integers(1, 60)


@settings(deadline=None)
@given(adapters, counts, st.integers(1, 8))
def test_shards_are_distinct_partitions_of_the_topic(adapter_id: str, partitions: int, k: int) -> None:
    shards = shard_partitions(adapter_id, partitions, k)
    assert len(shards) == len(set(shards)) == min(k, partitions)
    assert set(shards) <= set(range(partitions))


@settings(deadline=None)
@given(adapters, counts, st.integers(1, 8))
def test_a_new_partition_takes_at_most_one_shard_and_moves_no_other(adapter_id: str, partitions: int, k: int) -> None:
    before = set(shard_partitions(adapter_id, partitions, k))
    after = set(shard_partitions(adapter_id, partitions + 1, k))
    assert after - before <= {partitions}
    assert len(before - after) <= 1


@settings(deadline=None)
@given(adapters, counts, st.integers(1, 7))
def test_one_shard_more_keeps_the_others(adapter_id: str, partitions: int, k: int) -> None:
    assert shard_partitions(adapter_id, partitions, k + 1)[:k] == shard_partitions(adapter_id, partitions, k)


def test_adapters_spread_evenly() -> None:
    adapters, partitions, k = 4000, 12, 2
    owned = Counter(p for i in range(adapters) for p in shard_partitions(f"tenant/{i}", partitions, k))
    expected = adapters * k / partitions
    assert all(0.85 * expected < owned[p] < 1.15 * expected for p in range(partitions)), owned


def test_few_adapters_share_all_their_shards() -> None:
    pairs = Counter(frozenset(shard_partitions(f"tenant/{i}", 12, 2)) for i in range(660))
    assert len(pairs) == 66  # every pair of 12 is somebody's
    assert max(pairs.values()) < 660 * 0.04


def test_the_choice_does_not_change_between_releases() -> None:
    """Other clients and older ones must agree on who owns what."""
    assert shard_partitions("acme/support", 12, 3) == (1, 3, 9)
    assert shard_partitions("ünï/cödé", 100, 2) == (88, 69)


@pytest.mark.parametrize(("partitions", "k"), [(0, 1), (4, 0), (-1, 2), (4, -1)])
def test_no_partition_and_no_shard_are_refused(partitions: int, k: int) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        shard_partitions("a", partitions, k)


def test_the_base_model_spreads_over_all_partitions() -> None:
    chooser = PartitionChooser(shards=2)
    taken = Counter(chooser.take(None, 6) for _ in range(60))
    assert taken == dict.fromkeys(range(6), 10)


def test_an_adapter_stays_in_its_shards_and_loads_them_equally() -> None:
    chooser = PartitionChooser(shards=3)
    taken = Counter(chooser.take("acme/support", 12) for _ in range(90))
    assert taken == dict.fromkeys(shard_partitions("acme/support", 12, 3), 30)


def test_the_slower_shard_gets_less() -> None:
    chooser = PartitionChooser(shards=2)
    slow, quick = shard_partitions("acme/support", 12, 2)
    taken: Counter[int] = Counter()
    for _ in range(100):
        partition = chooser.take("acme/support", 12)
        taken[partition] += 1
        if partition == quick:
            chooser.release(quick)
    assert taken[slow] == 1
    assert chooser.in_flight(slow) == 1
    assert chooser.in_flight(quick) == 0


def test_turns_are_taken_when_nothing_is_in_flight() -> None:
    chooser = PartitionChooser(shards=2)
    taken = set()
    for _ in range(2):
        partition = chooser.take("acme/support", 12)
        chooser.release(partition)
        taken.add(partition)
    assert taken == set(shard_partitions("acme/support", 12, 2))


@settings(deadline=None)
@given(st.none() | adapters, counts, st.text(min_size=1, max_size=40))
def test_a_request_that_may_come_again_goes_where_it_went(adapter: str | None, count: int, request_id: str) -> None:
    first, later = PartitionChooser(shards=3), PartitionChooser(shards=3)
    for _ in range(5):
        later.take(adapter, count)
    partition = first.take(adapter, count, request_id)
    assert later.take(adapter, count, request_id) == partition
    assert partition in (range(count) if adapter is None else shard_partitions(adapter, count, 3))


def test_requests_that_may_come_again_spread_over_the_shards() -> None:
    chooser = PartitionChooser(shards=3)
    taken = Counter(chooser.take("acme/support", 12, f"r{i}") for i in range(900))
    assert set(taken) == set(shard_partitions("acme/support", 12, 3))
    assert max(taken.values()) < 360


class Choosing(RuleBasedStateMachine):
    """Requests come and go while the topic grows: the chosen shard is always one of the least loaded."""

    def __init__(self) -> None:
        super().__init__()
        self.chooser = PartitionChooser(shards=3)
        self.partitions = 4
        self.flying: list[int] = []

    @rule(adapter=st.sampled_from([None, "a", "b", "acme/support"]))
    def take(self, adapter: str | None) -> None:
        allowed = range(self.partitions) if adapter is None else shard_partitions(adapter, self.partitions, 3)
        least = min(self.flying.count(p) for p in allowed)
        partition = self.chooser.take(adapter, self.partitions)
        assert partition in allowed
        assert self.flying.count(partition) == least
        self.flying.append(partition)

    @precondition(lambda self: self.flying)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.chooser.release(self.flying.pop(data.draw(st.integers(0, len(self.flying) - 1))))

    @rule()
    def grow(self) -> None:
        self.partitions += 1

    @invariant()
    def counts_agree(self) -> None:
        assert all(self.chooser.in_flight(p) == self.flying.count(p) for p in range(self.partitions))


TestChoosing = Choosing.TestCase
TestChoosing.settings = settings(max_examples=50, stateful_step_count=40, deadline=None)
