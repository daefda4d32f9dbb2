"""The eviction policy forgets what leaves, spares what may not go, and keeps what is used again."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from loramux_worker.adapters.eviction import S3Fifo


class PolicyMachine(RuleBasedStateMachine):
    """A tier of 100 units that evicts until what comes in has room."""

    @initialize()
    def make(self) -> None:
        self.policy: S3Fifo[int] = S3Fifo(100)
        self.sizes: dict[int, int] = {}
        self.kept: set[int] = set()

    @rule(key=st.integers(0, 30), size=st.integers(1, 30))
    def use(self, key: int, size: int) -> None:
        if key in self.sizes:
            self.policy.touch(key)
            return
        while sum(self.sizes.values()) + size > 100:
            victim = self.policy.evict(lambda k: k not in self.kept)
            if victim is None:
                assert self.sizes.keys() <= self.kept, "one that may go is found"
                return
            assert victim not in self.kept
            del self.sizes[victim]
        self.policy.add(key, size)
        self.sizes[key] = size

    @precondition(lambda self: self.sizes)
    @rule(data=st.data())
    def keep_or_release(self, data: st.DataObject) -> None:
        self.kept ^= {data.draw(st.sampled_from(sorted(self.sizes)))}

    @precondition(lambda self: self.sizes)
    @rule(data=st.data())
    def remove(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.sizes)))
        self.policy.remove(key)
        del self.sizes[key]

    @invariant()
    def knows_what_is_there(self) -> None:
        if hasattr(self, "policy"):
            assert len(self.policy) == len(self.sizes)


TestPolicies = PolicyMachine.TestCase


def test_nothing_to_evict() -> None:
    policy: S3Fifo[int] = S3Fifo(10)
    assert policy.evict(lambda key: True) is None
    policy.add(1, 10)
    assert policy.evict(lambda key: False) is None
    assert policy.evict(lambda key: True) == 1
    assert len(policy) == 0


def test_a_scan_does_not_push_out_what_is_used_again() -> None:
    policy: S3Fifo[int] = S3Fifo(10)
    for key in range(10):
        policy.add(key, 1)
        policy.touch(key)
    for key in range(100, 160):  # named once and never again
        victim = policy.evict(lambda k: True)
        assert victim is not None
        policy.add(key, 1)
    assert sum(policy.evict(lambda k: k in range(10)) is not None for _ in range(10)) >= 8


def test_what_comes_back_soon_is_kept_longer() -> None:
    policy: S3Fifo[str] = S3Fifo(3)
    for key in ("a", "b", "c"):
        policy.add(key, 1)
    assert policy.evict(lambda k: True) == "a"
    policy.add("a", 1)  # its ghost is remembered
    assert [policy.evict(lambda k: True) for _ in range(3)] == ["b", "c", "a"]
