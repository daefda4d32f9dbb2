"""What steps and tiers cost: measured figures, and the line between them.

Steps: `tests/benchmarks/results/engine-8b.json` and `engine-1b.json` (NVIDIA H100 80 GB, adapters of rank 16 on seven
linears, contexts of 64 to 192 tokens). Tiers: README, "Measured", and what `sim_fairness.py` takes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from loramux_worker.planning.shape import ModelShape

GB = 10**9

BATCHES = (1, 8, 32, 64, 128, 256)
_CONTEXT = 128  # tokens of a sequence in the middle of a measured one


@dataclass(frozen=True, kw_only=True)
class StepCosts:
    """Milliseconds of a decode step by `BATCHES`, and of what comes to it."""

    step_bytes: float
    base: tuple[float, ...]  # without adapters
    lora: tuple[float, ...]  # one adapter for all sequences, beyond base
    prompt_token: float
    bytes_per_ms: float = 2.94e9  # a copy on that device: what longer contexts and further adapters are read at

    @classmethod
    def of(cls, shape: ModelShape, speed: float = 1.0) -> StepCosts:
        """Between the measured shapes and beyond the larger by bytes of weights; below the smaller, its own.

        `speed`: of the device, beside the one that was measured.
        """
        size = max(shape.step_bytes, _SMALL.step_bytes)
        share = (size - _SMALL.step_bytes) / (_LARGE.step_bytes - _SMALL.step_bytes)

        def between(small: float, large: float) -> float:
            return (small + share * (large - small)) / speed

        return replace(
            _SMALL,
            step_bytes=size,
            base=tuple(map(between, _SMALL.base, _LARGE.base)),
            lora=tuple(map(between, _SMALL.lora, _LARGE.lora)),
            prompt_token=between(_SMALL.prompt_token, _LARGE.prompt_token),
            bytes_per_ms=_SMALL.bytes_per_ms * speed,
        )

    def step_ms(self, sequences: float, adapter_bytes: float, kv_bytes_per_token: int, context: float) -> float:
        """A decode step of `sequences` with `adapter_bytes` of distinct adapters beyond the first, 0 or more.

        `context`: tokens of a sequence in the middle of its life; those beyond the measured ones are read too.
        """
        sequences = max(1.0, sequences)
        further = sequences * (context - _CONTEXT) * kv_bytes_per_token
        return (
            float(np.interp(sequences, BATCHES, self.base) + np.interp(sequences, BATCHES, self.lora))
            + max(0.0, adapter_bytes) / self.bytes_per_ms
            + further / self.bytes_per_ms
        )


_LARGE = StepCosts(
    step_bytes=15_009_849_344,
    base=(5.341, 5.846, 6.090, 6.549, 7.496, 9.854),
    lora=(0.399, 0.699, 0.555, 0.683, 1.145, 1.752),
    prompt_token=(112.24 / 2 - 5.740) / 2048,
)
_SMALL = StepCosts(  # at 8, 32 and 128 sequences on the line between its three batches
    step_bytes=2_069_024_768,
    base=(1.043, 1.074, 1.179, 1.319, 1.621, 2.225),
    lora=(0.231, 0.246, 0.297, 0.365, 0.363, 0.360),
    prompt_token=(27.17 / 2 - 1.274) / 2048,
)


@dataclass(frozen=True, kw_only=True)
class TierSpeeds:
    """Bytes a second between tiers, of one worker."""

    copy: float = 50 * GB  # pinned host memory to the device
    read: float = 1.2 * GB  # disk to host, all threads together
    readers: int = 4
    download: float = 0.2 * GB  # store to disk, of one adapter: an assumption, measure yours
    downloads: int = 8
    store_latency: float = 0.1  # seconds until the first byte: an assumption too

    def load_seconds(self, num_bytes: float) -> tuple[float, float, float, float]:
        """What a request for an adapter of that size waits for it in the pool, on the host, on disk, in the store."""
        host = num_bytes / self.copy
        disk = host + num_bytes / (self.read / self.readers)
        return 0.0, host, disk, disk + self.store_latency + num_bytes / self.download
