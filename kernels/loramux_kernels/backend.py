"""Which implementation of an op runs where.

An op is two files: `<op>.py` holds the torch reference and the public function, `<op>_triton.py` the kernel and its
launcher. The public function imports the second one when it is called, so that the package can be imported where
Triton does not exist (macOS, a client's laptop). Ops that also serve models on a CPU ask `runs_triton` which one to
take; those of the fused decoder are the kernels, and on a CPU run in Triton's interpreter alone.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor

# Triton 3.9 warns where nobody chose, and 3.10 is to choose otherwise
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

INTERPRETED: bool = os.environ.get("TRITON_INTERPRET", "").lower() in {"1", "true", "yes", "on", "y"}
"""Triton's interpreter runs the kernels, on any device; only tests and debugging want that."""


def runs_triton(tensor: Tensor) -> bool:
    """Whether ops on `tensor` are Triton's; torch's otherwise."""
    return tensor.is_cuda and _has_triton()


def pdl(device: torch.device) -> bool:
    """Whether kernels on `device` can be launched while the one before still runs (programmatic dependent launch)."""
    return device.type == "cuda" and _launches_early(device)


@cache
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that one program may use; a guess that every GPU keeps where none is there to ask."""
    if device.type != "cuda":
        return 64 * 1024
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _launches_early(device: torch.device) -> bool:
    if INTERPRETED or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= (9, 0)
