"""Small copies between host and device that nobody waits for.

A copy out of or into ordinary memory stops the host until the device has come to it. One out of or into pinned
memory only takes its place in the stream. torch's allocator of pinned memory hands a piece out again only after the
copies that use it are done, so these may be dropped at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(
    device: torch.device, ints: Sequence[Sequence[int]] = (), floats: Sequence[Sequence[float]] = ()
) -> tuple[list[Tensor], list[Tensor]]:
    """Lists of any lengths to the device, all in one copy.

    Returns:
        int64 [length] for each of `ints`, float64 [length] for each of `floats`.
    """
    num_ints = sum(map(len, ints))
    lengths = [len(values) for values in (*ints, *floats)]
    host = torch.empty(sum(lengths), dtype=torch.int64, pin_memory=device.type == "cuda")
    host[:num_ints] = torch.tensor([v for values in ints for v in values], dtype=torch.int64)
    host[num_ints:].view(torch.float64)[:] = torch.tensor([v for values in floats for v in values], dtype=torch.float64)
    pieces = host.to(device, non_blocking=True).split(lengths)
    return list(pieces[: len(ints)]), [piece.view(torch.float64) for piece in pieces[len(ints) :]]


def download(tensor: Tensor) -> Tensor:
    """A tensor's copy on the host, to be read when an event recorded after this call is over."""
    if not tensor.is_cuda:
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def record_event(device: torch.device) -> torch.cuda.Event | None:
    """What is over when the device has done all that was enqueued; None where it has by now."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event
