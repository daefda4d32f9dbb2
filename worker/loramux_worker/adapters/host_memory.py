"""Memory that goes back to the system when it is dropped: for the host tier, and for what it reads into.

Neither malloc nor torch's allocator for pinned memory promises that: both keep what is freed, and the latter rounds up
to a power of two. An anonymous mapping is exact to the page and is gone when its last tensor is. Pages are pinned by
registering the mapping with CUDA.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable

import torch
from torch import Tensor


class _PinnedMapping(mmap.mmap):
    """A mapping registered with CUDA from `register` to its end, so that copies to the device need no staging."""

    _address: int | None = None

    def register(self, address: int) -> None:
        """Pin the pages. Raises RuntimeError when CUDA refuses."""
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, len(self), 0))
        self._address = address

    def __del__(self) -> None:
        if self._address is not None:
            torch.cuda.cudart().cudaHostUnregister(self._address)


def allocate(
    num_elements: int, dtype: torch.dtype, *, pin: bool, fill: Callable[[Tensor], object] = lambda run: None
) -> Tensor:
    """A run of elements on the CPU, zeroed, then given to `fill`, then pinned if asked.

    Filled first, its pages are mapped side by side with other loads, not one by one under the driver's lock. The
    memory is returned when the tensor is dropped. A copy to the device that is still running keeps nothing alive:
    whoever starts one holds on to the tensor.
    """
    # Private: systems give large pages to shared mappings, which are Python's default, rarely or never.
    mapping = _PinnedMapping(-1, num_elements * dtype.itemsize, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # mapped four times as fast, and pinned faster; some kernels have none
        mapping.madvise(mmap.MADV_HUGEPAGE)
    run = torch.frombuffer(mapping, dtype=dtype)
    fill(run)
    if pin:
        mapping.register(run.data_ptr())
    return run
