"""The host tier: loads in threads, evicts by bytes, never holds more than its capacity, returns its memory."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from adapter_folders import TARGETS, config, linear, make_adapter, weights, write
from loramux_schemas import ErrorCode
from loramux_worker.adapters.adapter_plan import AdapterLimits
from loramux_worker.adapters.host import HostTier, LoadResult
from loramux_worker.adapters.host_memory import HostMemory
from loramux_worker.adapters.peft_format import read_adapter
from loramux_worker.adapters.targets import TargetModule
from loramux_worker.engine.protocol import AdapterReference

LIMITS = AdapterLimits(max_rank=64, dtype=torch.float32)
RANK_BYTES = 4 * 2 * (12 + 12)  # q_proj of two layers, for each 1 of rank; ranks below are even, so nothing is padded


class Loader:
    """A tier whose news can be waited for; `hold` keeps a thread that has finished a load from taking the next."""

    def __init__(self, capacity: int, targets: tuple[TargetModule, ...] = TARGETS, max_loads: int = 4) -> None:
        self._news = threading.Semaphore(0)
        self.go = threading.Event()
        self.go.set()
        self.tier = HostTier(capacity, targets, LIMITS, max_loads=max_loads, wake=self._wake)

    def _wake(self) -> None:
        self._news.release()
        assert self.go.wait(30)

    def results(self, count: int) -> list[LoadResult]:
        """Wait for this many loads to end."""
        for _ in range(count):
            assert self._news.acquire(timeout=30), "a load never ended"
        results = self.tier.poll()
        assert len(results) == count
        return results

    def load(self, *references: AdapterReference) -> list[LoadResult]:
        for reference in references:
            self.tier.load(reference)
        return self.results(len(references))


@pytest.fixture
def loaders() -> Iterator[list[Loader]]:
    made: list[Loader] = []
    yield made
    for loader in made:
        loader.go.set()
        loader.tier.close()


@pytest.fixture
def loader(loaders: list[Loader]) -> Loader:
    """Room for ranks of 12 in all."""
    loaders.append(Loader(12 * RANK_BYTES))
    return loaders[0]


@pytest.fixture
def single(loaders: list[Loader]) -> Loader:
    """One thread, room for ranks of 12 in all."""
    loaders.append(Loader(12 * RANK_BYTES, max_loads=1))
    return loaders[0]


def adapter(tmp_path: Path, name: str, rank: int = 4) -> AdapterReference:
    return make_adapter(tmp_path, name, rank=rank, modules=["q_proj"], seed=sum(name.encode()))


def test_an_adapter_is_packed_as_its_layout_says(tmp_path: Path, loader: Loader) -> None:
    reference = adapter(tmp_path, "a")
    [result] = loader.load(reference)
    assert result.key == reference.key
    assert result.error is None
    assert result.seconds > 0
    held = loader.tier.get(reference.key)
    assert held is not None
    assert held.rank == 4
    assert held.num_bytes == loader.tier.bytes_used == 4 * RANK_BYTES
    expected = read_adapter(Path(reference.path), TARGETS, LIMITS)
    for place, module in zip(held.layout.modules, expected.modules, strict=True):
        assert torch.equal(place.a(held.run), module.a)
        assert torch.equal(place.b(held.run), module.b)


def test_one_flight_for_each_adapter(tmp_path: Path, single: Loader) -> None:
    first, reference = adapter(tmp_path, "f"), adapter(tmp_path, "a")
    single.go.clear()  # the thread stops behind its first load
    single.load(first)
    for _ in range(20):
        single.tier.load(reference)
    assert single.tier.is_loading(reference.key)
    single.go.set()
    single.results(1)
    assert not single.tier.is_loading(reference.key)
    single.tier.load(reference)
    assert (single.tier.misses_total, single.tier.hits_total) == (2, 1)
    assert single.tier.poll() == []


def test_what_was_used_once_goes_first(tmp_path: Path, loader: Loader) -> None:
    a, b, c, d = (adapter(tmp_path, name) for name in "abcd")
    for reference in (a, b, c):
        loader.load(reference)
    loader.tier.load(a)  # a second request for it
    loader.load(d)
    assert loader.tier.get(b.key) is None
    assert all(loader.tier.get(reference.key) is not None for reference in (a, c, d))
    assert loader.tier.evictions_total == 1
    assert loader.tier.bytes_used == loader.tier.capacity_bytes


def test_wanted_is_not_evicted_and_loads_wait_for_room(tmp_path: Path, loader: Loader) -> None:
    a, b, c, d = (adapter(tmp_path, name) for name in "abcd")
    for reference in (a, b, c):
        loader.tier.want(reference.key)
    loader.load(a, b, c)
    loader.tier.load(d)
    assert loader.tier.is_loading(d.key)
    loader.tier.unwant(b.key)
    [result] = loader.results(1)
    assert result.key == d.key
    assert loader.tier.get(b.key) is None
    assert loader.tier.get(a.key) is not None


def test_a_large_adapter_is_not_overtaken(tmp_path: Path, single: Loader) -> None:
    a, b, large, small = (adapter(tmp_path, name, rank) for name, rank in (("a", 6), ("b", 4), ("l", 10), ("s", 2)))
    for reference in (a, b, large, small):
        single.tier.want(reference.key)
    single.load(a, b)
    single.tier.load(large)  # 2 of 12 are free
    single.tier.load(small)  # would fit, but large came first
    gone = AdapterReference("gone", "r", str(tmp_path / "gone"))
    assert [result.key for result in single.load(gone)] == [gone.key], "the thread has looked at both before"
    single.tier.unwant(b.key)
    assert single.tier.is_loading(small.key)
    single.tier.unwant(a.key)
    results = single.results(2)
    assert [result.key for result in results] == [large.key, small.key]


def test_what_is_wanted_is_loaded_before_what_is_only_prefetched(tmp_path: Path, single: Loader) -> None:
    first, *others = (adapter(tmp_path, name, 2) for name in "fabcd")
    single.go.clear()  # the thread stops behind its first load, the others queue up
    single.load(first)
    for reference in others:
        single.tier.load(reference)
    single.tier.want(others[3].key)
    single.tier.want(others[1].key)
    single.go.set()
    keys = [result.key for result in single.results(4)]
    assert keys == [others[i].key for i in (1, 3, 0, 2)]


def test_what_is_served_sooner_is_loaded_first(tmp_path: Path, single: Loader) -> None:
    first, *others = (adapter(tmp_path, name, 2) for name in "fabcd")
    single.go.clear()
    single.load(first)
    for reference, turn in zip(others, (30.0, 10.0, 20.0, 10.0), strict=True):
        single.tier.load(reference)
        single.tier.want(reference.key, turn)
    single.tier.want(others[0].key, 0.0)  # it has its turn
    single.go.set()
    keys = [result.key for result in single.results(4)]
    assert keys == [others[i].key for i in (1, 3, 2, 0)]


def test_a_prefetch_that_waits_for_room_gives_way_to_what_is_wanted(tmp_path: Path, single: Loader) -> None:
    a, prefetched, wanted = (adapter(tmp_path, name, rank) for name, rank in (("a", 8), ("p", 8), ("w", 4)))
    single.tier.want(a.key)
    single.load(a)
    single.tier.load(prefetched)
    single.tier.want(wanted.key)
    assert [result.key for result in single.load(wanted)] == [wanted.key]
    single.tier.unwant(a.key)
    assert [result.key for result in single.results(1)] == [prefetched.key]


def test_failure_is_told_once_and_tried_again_when_asked(tmp_path: Path, loader: Loader) -> None:
    folder = write(tmp_path / "bad", config(4, ["k_proj"]), weights(TARGETS, 4, ["q_proj"], seed=0))
    reference = AdapterReference("bad", "r", str(folder))
    [result] = loader.load(reference)
    assert result.error is not None
    assert result.error.code is ErrorCode.ADAPTER_INVALID
    assert loader.tier.poll() == []
    assert loader.tier.bytes_used == 0
    assert not loader.tier.is_loading(reference.key)
    write(folder, config(4, ["q_proj"]), weights(TARGETS, 4, ["q_proj"], seed=0))
    assert loader.load(reference)[0].error is None


def test_bad_values_give_their_room_back(tmp_path: Path, loader: Loader) -> None:
    tensors = weights(TARGETS, 12, ["q_proj"], seed=0)
    next(iter(tensors.values()))[0, 0] = float("nan")
    folder = write(tmp_path / "nan", config(12, ["q_proj"]), tensors)
    [result] = loader.load(AdapterReference("nan", "r", str(folder)))
    assert "NaN" in str(result.error)
    assert loader.tier.bytes_used == 0
    assert loader.load(adapter(tmp_path, "a", 12))[0].error is None


def test_larger_than_the_tier(tmp_path: Path, loader: Loader) -> None:
    kept = adapter(tmp_path, "a")
    loader.load(kept)
    [result] = loader.load(adapter(tmp_path, "huge", 14))
    assert result.error is not None
    assert result.error.code is ErrorCode.ADAPTER_INVALID
    assert f"the host tier has {12 * RANK_BYTES}" in result.error.message
    assert loader.tier.get(kept.key) is not None


def test_files_that_are_gone_may_be_asked_for_again(tmp_path: Path, loader: Loader) -> None:
    [result] = loader.load(AdapterReference("gone", "r", str(tmp_path / "gone")))
    assert result.error is not None
    assert result.error.code is ErrorCode.ADAPTER_UNAVAILABLE
    assert result.error.code.retryable


def test_no_memory_is_an_error_of_that_load(tmp_path: Path, loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object, **__: object) -> None:
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(HostMemory, "allocate", no_memory)
        [result] = loader.load(adapter(tmp_path, "a"))
    assert result.error is not None
    assert result.error.code is ErrorCode.INTERNAL
    assert loader.tier.bytes_used == 0
    assert loader.load(adapter(tmp_path, "a"))[0].error is None


def test_cancelled_loads_take_no_room_and_give_no_result(tmp_path: Path, single: Loader) -> None:
    a, parked, queued, last = (adapter(tmp_path, name, 8) for name in "apql")
    single.tier.want(a.key)
    single.load(a)
    single.tier.load(parked)
    single.tier.load(queued)
    single.tier.cancel(parked.key)
    single.tier.cancel(queued.key)
    single.tier.unwant(a.key)
    assert [result.key for result in single.load(last)] == [last.key]
    assert single.tier.bytes_used == 8 * RANK_BYTES
    assert single.tier.poll() == []


def test_dropped_memory_goes_back_to_the_system(tmp_path: Path, loaders: list[Loader]) -> None:
    targets = (linear("wide.q_proj", 4096, 4096),)
    path = make_adapter(tmp_path, "a", targets, 64, ["q_proj"]).path
    references = [AdapterReference(f"a{i}", "r", path) for i in range(64)]
    loaders.append(Loader(1 << 30, targets, max_loads=1))
    loader = loaders[0]
    loader.load(references[0])  # what is allocated once
    before = resident_bytes()
    loader.load(*references[1:])
    held = 63 * 2 * 4 * 64 * 4096
    assert loader.tier.bytes_used == held * 64 / 63
    assert resident_bytes() - before > 0.9 * held
    for reference in references[1:]:
        loader.tier.drop(reference.key)
    gc.collect()
    assert resident_bytes() - before < 0.1 * held


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_everyone_gets_a_turn_and_the_capacity_holds(tmp_path: Path, loader: Loader) -> None:
    """Many more adapters than fit, wanted in waves: each is loaded, and the tier is never over its capacity."""
    shuffle = random.Random(1)
    references = [adapter(tmp_path, f"a{i}", shuffle.choice([2, 4, 6, 8, 12])) for i in range(40)]
    waiting = {reference.key for reference in references}
    for reference in shuffle.sample(references, len(references)):
        loader.tier.want(reference.key)
        loader.tier.load(reference)
    while waiting:
        assert loader._news.acquire(timeout=30), f"{len(waiting)} were never loaded"
        assert 0 <= loader.tier.bytes_used <= loader.tier.capacity_bytes
        for result in loader.tier.poll():
            assert result.error is None
            assert loader.tier.get(result.key) is not None
            waiting.remove(result.key)
            loader.tier.unwant(result.key)
