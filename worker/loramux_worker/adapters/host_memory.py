"""Memory that goes back to the system when it is dropped: for the host tier, and for what it reads into.

Neither malloc nor torch's allocator for pinned memory promises that: both keep what is freed, and the latter rounds up
to a power of two. An anonymous mapping is exact to the page and is gone when its last tensor is. Pages are pinned by
registering the mapping with CUDA.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor


class _Mapping(mmap.mmap):
    """Zeroed pages; registered with CUDA from `pin` to their end, so that copies to the device need no staging."""

    _address: int | None = None

    @classmethod
    def of(cls, num_bytes: int) -> _Mapping:
        # Private: systems give large pages to shared mappings, which are Python's default, rarely or never.
        mapping = cls(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # mapped four times as fast, and pinned faster; some kernels have none
            mapping.madvise(mmap.MADV_HUGEPAGE)
        return mapping

    @property
    def is_pinned(self) -> bool:
        return self._address is not None

    def pin(self, address: int) -> None:
        """Raises RuntimeError when CUDA refuses."""
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, len(self), 0))
        self._address = address

    def __del__(self) -> None:
        if self._address is not None:
            torch.cuda.cudart().cudaHostUnregister(self._address)


class HostMemory:
    """Runs of elements. Between `keep` and `trim`, the memory of one that is dropped is the next one's of its size.

    Mapping and pinning memory takes longer than reading an adapter into it, and a driver that pins lets nobody launch
    anything. A tier that is full evicts one adapter for another, mostly of the same size: there it need not be done
    again. Thread-safe; a run may be dropped anywhere, in a garbage collection too.
    """

    def __init__(self, *, pin: bool = False) -> None:
        self._pin = pin
        self._pinning = threading.Lock()  # one after the other: whoever launches waits for one of them at most
        self._keeps = False
        self._kept: deque[_Mapping] = deque()

    @property
    def bytes_kept(self) -> int:
        """Bytes that no run has."""
        return sum(map(len, tuple(self._kept)))

    def allocate(
        self, num_elements: int, dtype: torch.dtype, fill: Callable[[Tensor], object] = lambda run: None
    ) -> Tensor:
        """A run on the CPU, with anything in it, given to `fill`, then pinned.

        Filled first, its pages are mapped side by side with other loads, not one by one under the driver's lock. A
        copy to the device that is still running keeps nothing alive: whoever starts one holds on to the tensor.
        Raises OSError or RuntimeError when there is no memory.
        """
        num_bytes = num_elements * dtype.itemsize
        mapping = self._take(num_bytes) or _Mapping.of(num_bytes)
        memory = np.frombuffer(mapping, np.uint8)
        weakref.finalize(memory, self._give_back, mapping).atexit = False
        run = torch.from_numpy(memory).view(dtype)
        fill(run)
        if self._pin and not mapping.is_pinned:
            with self._pinning:
                mapping.pin(run.data_ptr())
        return run

    def keep(self) -> None:
        """From now on keep what is dropped."""
        self._keeps = True

    def trim(self) -> None:
        """Give back what is kept, and what is dropped from now on."""
        self._keeps = False
        self._kept.clear()

    def _give_back(self, mapping: _Mapping) -> None:
        if self._keeps:
            self._kept.append(mapping)

    def _take(self, num_bytes: int) -> _Mapping | None:
        """One of that size; None, and as many bytes of others as it will have are given back."""
        others: list[_Mapping] = []
        with contextlib.suppress(IndexError):  # the end of them
            while True:
                mapping = self._kept.popleft()
                if len(mapping) == num_bytes:
                    self._kept.extend(others)
                    return mapping
                others.append(mapping)
        while others and num_bytes > 0:
            num_bytes -= len(others.pop())
        self._kept.extend(others)
        return None


def allocate(num_elements: int, dtype: torch.dtype, *, pin: bool) -> Tensor:
    """A single run of zeros, see `HostMemory.allocate`."""
    return HostMemory(pin=pin).allocate(num_elements, dtype)
