"""Where a step's time goes on the device, by kernel: of decode steps, and of a prefill."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from gpu_rig import Rig
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_STEPS, _SHOWN = 8, 12


def profile_steps(rig: Rig, batches: Sequence[int], mixes: dict[str, Any]) -> list[dict[str, Any]]:
    """Microseconds a step: of the whole, and of the kernels that take most.

    Kernels overlap (programmatic dependent launch), and one that waits for the kernel in front of it counts its wait:
    so they may add up to more than the whole.
    """
    cases = [("decode", batch, mix) for batch in batches for mix in mixes] + [("prefill", 64, mix) for mix in mixes]
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:  # a second one in a process sees no graphs
        for what, batch, mix in cases:
            if what == "decode":
                rig.submit(batch, 64, 2 * _STEPS, mixes[mix])
                rig.drain(most_steps=4 + batch * 64 // 4096)
            else:
                rig.submit(batch, 64, 1, mixes[mix])
                rig.drain()
                rig.submit(batch, 64, 1, mixes[mix])
            torch.cuda._sleep(1000)
            rig.drain(most_steps=_STEPS)
            torch.cuda._sleep(1000)
            rig.drain()
        torch.cuda.synchronize()
    events = [event for event in recorded.events() if event.device_type == DeviceType.CUDA]
    events.sort(key=lambda event: event.time_range.start)
    marks = [i for i, event in enumerate(events) if "spin_kernel" in event.name]
    assert len(marks) == 2 * len(cases), "the profiler has lost events"
    pieces = [events[first + 1 : last] for first, last in zip(marks[::2], marks[1::2], strict=True)]
    return [
        {"step": what, "batch": batch, "mix": mix, **_figures(piece, _STEPS if what == "decode" else 1)}
        for (what, batch, mix), piece in zip(cases, pieces, strict=True)
    ]


def _figures(kernels: Sequence[Any], steps: int) -> dict[str, Any]:
    spent: Counter[str] = Counter()
    for event in kernels:
        spent[_short(event.name)] += event.time_range.elapsed_us()
    took = kernels[-1].time_range.end - kernels[0].time_range.start
    return {
        "step_us": round(took / steps),
        "launches": round(len(kernels) / steps),
        "by_kernel_us": {name: round(time / steps) for name, time in spent.most_common(_SHOWN)},
    }


def _short(name: str) -> str:
    """Without the arguments of templates."""
    return name.removeprefix("void ").split("<")[0].split("(")[0][:60]
