"""Random numbers that depend on nothing but (seed, position).

SplitMix64 (Steele, Lea and Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014) as a hash of the
pair: a seeded request draws the same numbers whatever it is batched with, after a preemption and on another engine.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _signed(constant: int) -> int:
    return constant - (1 << 64) if constant >= 1 << 63 else constant


_GOLDEN = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's `>>` carries the sign of an int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def counter_uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """A number in [0, 1) for each pair.

    Args:
        seeds, positions: int64 [rows].

    Returns:
        float64 [rows].
    """
    mixed = _mix(_mix(seeds + _GOLDEN) + positions * _GOLDEN)
    return _shift_right(mixed, 11).to(torch.float64) * 2.0**-53
