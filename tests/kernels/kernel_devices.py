"""Where the kernels are tested: natively on a GPU, elsewhere in Triton's interpreter, which knows no bfloat16."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import pytest
import torch

_ON_GPU = (torch.float32, torch.float16, torch.bfloat16)
_INTERPRETED = () if torch.cuda.is_available() else (torch.float32, torch.float16)

DEVICES = [
    *(("cpu", dtype) for dtype in _INTERPRETED),
    *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in _ON_GPU),
]
"""(device, dtype) pairs for `parametrize`."""

TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Relative error that rounding to the dtype explains."""


def device_cases(
    cases: Mapping[str, Any], *, float32: Collection[str] | None = None, float16: Collection[str]
) -> list[Any]:
    """(device, dtype, case) for `parametrize`: all of `cases` on a GPU, in every dtype.

    The interpreter takes as long as a GPU takes little, and there a dtype is a matter of conversions: it runs the
    cases that are named for it (`float32`: all of them where none are).
    """
    named = {torch.float32: list(cases) if float32 is None else float32, torch.float16: float16}
    assert cases.keys() >= {*named[torch.float32], *float16}
    chosen = [
        pytest.param("cpu", dtype, cases[name], id=f"cpu-{str(dtype)[6:]}-{name}")
        for dtype in _INTERPRETED
        for name in named[dtype]
    ]
    for dtype in _ON_GPU:
        for name, case in cases.items():
            chosen.append(pytest.param("cuda", dtype, case, id=f"cuda-{str(dtype)[6:]}-{name}", marks=pytest.mark.gpu))
    return chosen
