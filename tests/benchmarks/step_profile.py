"""Where a decode step's time goes on the device, by kernel."""

from __future__ import annotations

from collections import Counter
from typing import Any

from gpu_rig import Rig
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

_STEPS, _SHOWN = 8, 12


def profile_step(rig: Rig, batch: int, adapters: Any) -> dict[str, Any]:
    """Microseconds a step: of the whole, and of the kernels that take most.

    Kernels overlap (programmatic dependent launch), and one that waits for the kernel in front of it counts its wait:
    so they add up to more than the whole.
    """
    rig.submit(batch, 64, 64, adapters)
    rig.drain(most_steps=16 + batch * 64 // 4096)
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        rig.drain(most_steps=_STEPS)
    rig.drain()
    kernels = [event for event in recorded.events() if event.device_type == DeviceType.CUDA]
    spent: Counter[str] = Counter()
    for event in kernels:
        spent[_short(event.name)] += event.time_range.elapsed_us()
    first, last = (pick(e.time_range.start for e in kernels) for pick in (min, max))
    return {
        "batch": batch,
        "step_us": round((last - first) / _STEPS),
        "launches": round(len(kernels) / _STEPS),
        "by_kernel_us": {name: round(time / _STEPS) for name, time in spent.most_common(_SHOWN)},
    }


def _short(name: str) -> str:
    """Without the arguments of templates."""
    return name.removeprefix("void ").split("<")[0].split("(")[0][:60]
