"""The gated activation that takes in what adapters add to gate and up."""

from __future__ import annotations

import pytest
import torch
from kernel_devices import TOLERANCE, device_cases
from test_lora_kernels import IN, MIXES, RANKS, Pool

from loramux_kernels import Activation, gated_activation, lora_delta, lora_gated_activation
from loramux_kernels.lora_plan import plan_rows

CASES = {
    f"{mix}, segments of {most}": (mix, most)
    for mix in ("all distinct", "runs", "runs of large rank")
    for most in (16, 64)
}
INTERPRETED = {
    "float32": ["all distinct, segments of 16", "runs, segments of 64"],
    "float16": ["runs, segments of 16"],
}


@pytest.mark.parametrize(("device", "dtype", "case"), device_cases(CASES, **INTERPRETED))
def test_is_the_activation_of_the_sums(device, dtype, case):
    mix, most_in_segment = case
    slots, width = MIXES[mix], 160
    pool = Pool((width, width), dtype, device)
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(len(slots), IN, generator=generator).to(dtype).to(device)
    gate_up = torch.randn(len(slots), 2 * width, generator=generator).to(dtype).to(device)
    rows = plan_rows(slots, RANKS, most_in_segment, torch.device(device))
    delta = lora_delta(x, pool.weights, rows, pool.site)
    expected = gated_activation((gate_up.float() + delta.float()), Activation.SILU).double()
    out = lora_gated_activation(x, gate_up, pool.weights, rows, pool.site, Activation.SILU)
    assert (out.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()
