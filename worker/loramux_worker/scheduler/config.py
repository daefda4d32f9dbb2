"""Bounds of a step and the price of a token."""

from __future__ import annotations

from dataclasses import dataclass

from loramux_worker.errors import ConfigurationError


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """What bounds a step, and how service is counted (in weighted tokens).

    Since every running sequence must be able to get a token in every step, no more than `max_batched_tokens`
    sequences run at once, whatever `max_batch_sequences` says.
    """

    max_model_len: int  # tokens of the longest sequence: prompt + generated
    max_batched_tokens: int = 2048
    max_batch_sequences: int = 256
    max_batch_ranks: int = 4096  # sum of the ranks of the distinct adapters that run

    prompt_weight: float = 1.0
    generated_weight: float = 2.0

    locality: float = 0.0
    """Weighted tokens for which adapters that are in the batch may go before one that is not, and by which they may
    be ahead of it for that.

    More of it means fewer distinct adapters in a step and fewer copies to the device; less of it means that an
    adapter which nobody uses just now waits less. 0 is the fair order alone."""

    residency_quantum: float = 8192.0
    """Weighted tokens of adapters that may come into the batch past one for which there is no room, before none may;
    and by which others may be ahead of it, if they are still to be admitted.

    More of it means fuller batches, less of it means that adapters wait less long for room. The default is chosen by
    `tests/benchmarks/sim_fairness.py`."""

    max_skipped: int = 8
    """Adapters that a step may find without room before it looks only at those in the batch: bounds its cost."""

    def __post_init__(self) -> None:
        for name in (
            "max_model_len",
            "max_batched_tokens",
            "max_batch_sequences",
            "max_batch_ranks",
            "max_skipped",
        ):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("prompt_weight", "generated_weight", "locality", "residency_quantum"):
            if getattr(self, name) < 0:
                raise ConfigurationError(f"{name} is {getattr(self, name)}: it must not be negative")

    @property
    def max_running(self) -> int:
        """Sequences that may run at once."""
        return min(self.max_batch_sequences, self.max_batched_tokens)
