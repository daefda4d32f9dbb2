"""Where the kernels are tested: natively on a GPU, elsewhere in Triton's interpreter, which knows no bfloat16."""

from __future__ import annotations

import pytest
import torch

_GPU = [pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in (torch.float32, torch.float16, torch.bfloat16)]
_INTERPRETER = [] if torch.cuda.is_available() else [("cpu", torch.float32), ("cpu", torch.float16)]

DEVICES = [*_INTERPRETER, *_GPU]
"""(device, dtype) pairs for `parametrize`."""

TOLERANCE = {torch.float32: 2e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
"""Relative error that rounding to the dtype explains."""
