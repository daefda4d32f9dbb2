"""Adapters on their way from disk to the pool, as the engine and its scheduler see them."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from adapter_folders import TARGETS, make_adapter
from loramux_schemas import ErrorCode
from loramux_worker.adapters import residency as residency_module
from loramux_worker.adapters.adapter_plan import AdapterLimits
from loramux_worker.adapters.gpu_pool import AdapterPool
from loramux_worker.adapters.host import HostTier, LoadResult
from loramux_worker.adapters.peft_format import read_adapter
from loramux_worker.adapters.residency import AdapterResidency
from loramux_worker.engine.protocol import AdapterReference

LIMITS = AdapterLimits(max_rank=64, dtype=torch.float32)
RANK_ELEMENTS = 2 * (12 + 12)  # q_proj of two layers, for each 1 of rank


class Engine:
    """What an engine does with the residency: it waits for news when it has nothing to run."""

    def __init__(self, host_ranks: int, pool_ranks: int) -> None:
        self._news = threading.Semaphore(0)
        host = HostTier(4 * RANK_ELEMENTS * host_ranks, TARGETS, LIMITS, wake=self._news.release)
        pool = AdapterPool(RANK_ELEMENTS * pool_ranks, len(TARGETS), 8, torch.device("cpu"), torch.float32)
        self.adapters = AdapterResidency(host, pool)

    def wait(self) -> list[LoadResult]:
        """The next results."""
        results = self.adapters.poll()
        while not results:
            assert self._news.acquire(timeout=30), "no load ended"
            results = self.adapters.poll()
        return results

    def bring(self, reference: AdapterReference) -> None:
        """Load and acquire an adapter."""
        self.adapters.prefetch(reference)
        while self.adapters.rank(reference.key) is None:
            assert [result.error for result in self.wait()] == [None]
        assert self.adapters.acquire(reference.key)


@pytest.fixture
def engine() -> Iterator[Callable[[int, int], Engine]]:
    made: list[Engine] = []

    def make(host_ranks: int, pool_ranks: int) -> Engine:
        made.append(Engine(host_ranks, pool_ranks))
        return made[-1]

    yield make
    for each in made:
        each.adapters.close()


def adapter(tmp_path: Path, name: str, rank: int = 4) -> AdapterReference:
    return make_adapter(tmp_path, name, rank=rank, modules=["q_proj"], seed=sum(name.encode()))


def check_tiles(engine: Engine, reference: AdapterReference) -> None:
    expected = {m.target: m for m in read_adapter(Path(reference.path), TARGETS, LIMITS).modules}
    for target, tile in enumerate(engine.adapters.tiles(engine.adapters.slot(reference.key))):
        assert (tile is None) == (target not in expected)
        if tile is not None:
            assert torch.equal(tile[0], expected[target].a)
            assert torch.equal(tile[1], expected[target].b)


def test_the_way_of_an_adapter(tmp_path: Path, engine: Callable[[int, int], Engine]) -> None:
    subject = engine(8, 8)
    adapters, reference = subject.adapters, adapter(tmp_path, "a", 6)
    adapters.prefetch(reference)
    [result] = subject.wait()
    assert (result.key, result.error) == (reference.key, None)
    assert adapters.poll() == []
    assert adapters.rank(reference.key) == 6
    assert adapters.acquire(reference.key)
    assert adapters.acquire(reference.key)
    check_tiles(subject, reference)
    adapters.release(reference.key)
    adapters.release(reference.key)
    assert adapters.rank(reference.key) == 6
    adapters.forget(reference.key)
    assert adapters.pool.slot_of(reference.key) is not None, "it stays until its room is needed"


def test_not_loaded_cannot_be_acquired(tmp_path: Path, engine: Callable[[int, int], Engine]) -> None:
    subject = engine(8, 8)
    reference = adapter(tmp_path, "a")
    assert not subject.adapters.acquire(reference.key)
    subject.bring(reference)


def test_once_in_the_pool_it_needs_no_copy_on_the_host(tmp_path: Path, engine: Callable[[int, int], Engine]) -> None:
    subject = engine(4, 12)
    references = [adapter(tmp_path, name) for name in "abc"]
    for reference in references:
        subject.bring(reference)  # each takes the host tier's only room
    for reference in references:
        check_tiles(subject, reference)
        assert subject.adapters.rank(reference.key) == 4


def test_a_full_pool_says_no_until_something_is_released(tmp_path: Path, engine: Callable[[int, int], Engine]) -> None:
    subject = engine(16, 8)
    a, b, c = (adapter(tmp_path, name) for name in "abc")
    subject.bring(a)
    subject.bring(b)
    subject.adapters.prefetch(c)
    subject.wait()
    assert subject.adapters.rank(c.key) == 4
    assert not subject.adapters.acquire(c.key)
    check_tiles(subject, a)
    check_tiles(subject, b)
    subject.adapters.release(a.key)
    assert subject.adapters.acquire(c.key)
    check_tiles(subject, c)
    check_tiles(subject, b)


def test_evicted_from_both_tiers_comes_back(tmp_path: Path, engine: Callable[[int, int], Engine]) -> None:
    subject = engine(4, 4)
    a, b = adapter(tmp_path, "a"), adapter(tmp_path, "b")
    subject.bring(a)
    subject.adapters.release(a.key)
    subject.bring(b)
    subject.adapters.release(b.key)
    assert subject.adapters.rank(a.key) is None, "asking asks for the load"
    assert [result.error for result in subject.wait()] == [None]
    assert subject.adapters.rank(a.key) == 4
    assert subject.adapters.acquire(a.key)
    check_tiles(subject, a)


def test_failed_load_is_told_once_and_tried_again(tmp_path: Path, engine: Callable[[int, int], Engine]) -> None:
    subject = engine(8, 8)
    reference = adapter(tmp_path, "a")
    weights = Path(reference.path) / "adapter_model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1])
    subject.adapters.prefetch(reference)
    [result] = subject.wait()
    assert result.error is not None
    assert result.error.code is ErrorCode.ADAPTER_INVALID
    subject.adapters.forget(reference.key)
    assert subject.adapters.poll() == []
    weights.write_bytes(content)
    subject.bring(reference)


def test_larger_than_the_pool(tmp_path: Path, engine: Callable[[int, int], Engine]) -> None:
    subject = engine(32, 8)
    reference = adapter(tmp_path, "a", 10)
    subject.adapters.prefetch(reference)
    [result] = subject.wait()
    assert result.error is not None
    assert result.error.code is ErrorCode.ADAPTER_INVALID
    assert "the gpu pool has" in result.error.message
    assert subject.adapters.host.bytes_used == 0


def test_never_named_is_an_error_and_no_endless_wait(engine: Callable[[int, int], Engine]) -> None:
    subject = engine(8, 8)
    assert subject.adapters.rank(("nobody", "r")) is None
    assert subject.adapters.rank(("nobody", "r")) is None
    [result] = subject.adapters.poll()
    assert result.error is not None
    assert result.error.code is ErrorCode.ADAPTER_UNAVAILABLE


def test_what_nobody_waits_for_makes_room(tmp_path: Path, engine: Callable[[int, int], Engine]) -> None:
    subject = engine(4, 8)
    cancelled, other = adapter(tmp_path, "a"), adapter(tmp_path, "b")
    subject.adapters.prefetch(cancelled)
    subject.wait()
    assert subject.adapters.rank(cancelled.key) == 4  # a sequence waits for it, and the tier is full
    subject.adapters.prefetch(other)
    assert subject.adapters.rank(other.key) is None
    subject.adapters.forget(cancelled.key)
    [result] = subject.wait()
    assert (result.key, result.error) == (other.key, None)


def test_references_that_nobody_waits_for_are_bounded(
    tmp_path: Path, engine: Callable[[int, int], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(residency_module, "_MAX_REFERENCES", 4)
    subject = engine(40, 40)
    wanted = adapter(tmp_path, "wanted")
    subject.bring(wanted)
    for i in range(10):
        subject.adapters.prefetch(adapter(tmp_path, f"p{i}"))
    assert len(subject.adapters._references) == 4
    assert wanted.key in subject.adapters._references


def test_far_more_adapters_than_room_all_run(tmp_path: Path, engine: Callable[[int, int], Engine]) -> None:
    """The loop of an engine under 30 adapters with room for two or three in each tier: nothing waits for ever."""
    subject, shuffle = engine(12, 12), random.Random(3)
    adapters = subject.adapters
    references = [adapter(tmp_path, f"a{i}", shuffle.choice([2, 4, 8, 12])) for i in range(30)]
    waiting = {reference.key: reference for reference in references for _ in range(2)}
    running: list[AdapterReference] = []
    for reference in references:
        adapters.prefetch(reference)
        adapters.rank(reference.key)
    while waiting or running:
        adapters.poll()
        admitted = False
        for key in shuffle.sample(sorted(waiting), len(waiting)):
            if len(running) < 3 and adapters.rank(key) is not None and adapters.acquire(key):
                running.append(waiting.pop(key))
                admitted = True
        for reference in running:
            check_tiles(subject, reference)
        adapters.pool.check_integrity()
        if running:
            done = running.pop(shuffle.randrange(len(running)))
            adapters.release(done.key)
            adapters.forget(done.key)
        elif not admitted:
            subject.wait()


def test_the_two_messages_of_one_request_are_one_use(tmp_path: Path, engine: Callable[[int, int], Engine]) -> None:
    """The prefetch counts; the request that follows finds the adapter, and that is no hit."""
    subject = engine(8, 8)
    host, reference = subject.adapters.host, adapter(tmp_path, "a")
    subject.adapters.prefetch(reference)
    subject.wait()
    subject.adapters.expect(reference)
    assert (host.hits_total, host.misses_total) == (0, 1)
    subject.adapters.prefetch(reference)
    subject.adapters.expect(reference)
    assert (host.hits_total, host.misses_total) == (1, 1)


def test_a_request_without_a_prefetch_brings_its_adapter(tmp_path: Path, engine: Callable[[int, int], Engine]) -> None:
    """An engine that has just started is given the requests of the one that died."""
    subject = engine(8, 8)
    reference = adapter(tmp_path, "a")
    subject.adapters.expect(reference)
    assert [result.error for result in subject.wait()] == [None]
    assert subject.adapters.rank(reference.key) == 4
