"""Memory of the host tier: kept for the next run of its size while asked to, else given back; never had by two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from adapter_folders import TARGETS, make_adapter
from loramux_worker.adapters.adapter_plan import AdapterLimits
from loramux_worker.adapters.host import HostTier
from loramux_worker.adapters.host_memory import HostMemory


def test_what_is_dropped_is_the_next_ones_of_its_size() -> None:
    memory = HostMemory()
    memory.keep()
    run = memory.allocate(1000, torch.float32)
    assert not run.any()
    address = run.data_ptr()
    del run
    assert memory.bytes_kept == 4000
    again = memory.allocate(2000, torch.bfloat16)
    assert (again.data_ptr(), again.shape, again.dtype) == (address, (2000,), torch.bfloat16)
    assert memory.bytes_kept == 0


def test_a_view_holds_the_memory() -> None:
    memory = HostMemory()
    memory.keep()
    view = memory.allocate(1000, torch.float32)[10:20].view(2, 5)
    assert memory.bytes_kept == 0
    del view
    assert memory.bytes_kept == 4000


def test_nothing_is_kept_unless_asked() -> None:
    memory = HostMemory()
    memory.allocate(10, torch.float32)
    assert memory.bytes_kept == 0
    memory.keep()
    memory.allocate(10, torch.float32)
    assert memory.bytes_kept == 40
    memory.trim()
    assert memory.bytes_kept == 0
    memory.allocate(10, torch.float32)
    assert memory.bytes_kept == 0


def test_another_size_takes_the_place_of_as_much_and_no_more() -> None:
    memory = HostMemory()
    memory.keep()
    runs = [memory.allocate(100, torch.float32) for _ in range(4)]
    runs.clear()
    large = memory.allocate(150, torch.float32)  # of two
    assert memory.bytes_kept == 800
    assert memory.allocate(100, torch.float32).numel() == 100
    assert large.numel() == 150


def test_an_error_of_the_filling_leaves_the_memory_to_others() -> None:
    memory = HostMemory()
    memory.keep()

    def fail(_: Tensor) -> None:
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011 (no text)
        memory.allocate(10, torch.float32, fail)
    assert memory.bytes_kept == 40


@given(st.lists(st.tuples(st.sampled_from(["take", "drop", "keep", "trim"]), st.integers(1, 5)), max_size=60))
def test_no_two_have_the_same_memory_and_little_is_kept(steps: list[tuple[str, int]]) -> None:
    memory, held, most = HostMemory(), [], 0
    for number, (what, size) in enumerate(steps):
        match what:
            case "take":
                held.append((number, memory.allocate(size, torch.int64)))
                held[-1][1].fill_(number)
            case "drop" if held:
                held.pop(size % len(held))
            case "keep":
                memory.keep()
            case "trim":
                memory.trim()
                assert memory.bytes_kept == 0
        in_use = sum(run.nbytes for _, run in held)
        most = max(most, in_use)
        assert in_use + memory.bytes_kept <= most + 4 * 8, "less than one run more than were ever held at once"
        for owner, run in held:
            assert (run == owner).all()


def test_an_adapter_has_the_memory_of_the_one_that_it_takes_the_place_of(tmp_path: Path) -> None:
    first, second = (make_adapter(tmp_path, name, rank=4, modules=["q_proj"], seed=1) for name in "ab")
    tier = HostTier(4 * 4 * 2 * (12 + 12), TARGETS, AdapterLimits(max_rank=64, dtype=torch.float32), max_loads=1)
    addresses = []
    for reference in (first, second):
        tier.load(reference)
        while tier.is_loading(reference.key):
            pass
        adapter = tier.get(reference.key)
        assert adapter is not None
        addresses.append(adapter.run.data_ptr())
        del adapter
    tier.close()
    assert tier.num_adapters == 1
    assert addresses[0] == addresses[1]
