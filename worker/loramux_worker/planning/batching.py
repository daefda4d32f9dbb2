"""How many sequences are in a step of one worker, and how long it takes: Little's law and the measured costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loramux_worker.planning.costs import StepCosts
from loramux_worker.planning.popularity import Floats

MOST_SEQUENCES = 256  # of a step: `--max-batch-sequences`, and the largest that was measured
_MOST_PREFILL = 0.95  # of the time


@dataclass(frozen=True, kw_only=True)
class Requests:
    """What one request is, on average. Lengths in tokens."""

    prompt: int
    new: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The steady state of one worker: what a request sees that comes in."""

    sequences: float  # decoding at once, on average
    step_ms: float  # between two tokens of a sequence, prefill of others included
    step_p99_ms: float
    prefill_ms: float  # the step that computes a prompt
    adapters: float  # distinct ones in a step


@dataclass(frozen=True, kw_only=True, eq=False)
class Worker:
    """One worker's adapters: shares of its requests [n], their sum 1, and bytes [n]."""

    costs: StepCosts
    requests: Requests
    kv_bytes_per_token: int
    shares: Floats
    sizes: Floats

    def batch(self, rate: float) -> Batch | None:
        """At `rate` requests a second; None where steps would need more than `MOST_SEQUENCES`."""
        prefill = rate * self.requests.prompt * self.costs.prompt_token / 1e3  # share of the time
        if prefill > _MOST_PREFILL:
            return None
        low, high = 0.0, float(MOST_SEQUENCES)
        if self._needed(rate, prefill, high) > high:
            return None
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (middle, high) if self._needed(rate, prefill, middle) > middle else (low, middle)
        sequences = high
        seen = min(sequences + 1, MOST_SEQUENCES)  # its own among them
        step = self.step_ms(seen)
        prompt = self.requests.prompt * self.costs.prompt_token
        crowded = min(seen + 2.33 * np.sqrt(sequences), MOST_SEQUENCES)  # as many as chance brings at the 99th
        crowded_step = self.step_ms(crowded)
        return Batch(
            sequences=sequences,
            step_ms=step / (1 - prefill),
            step_p99_ms=crowded_step + prompt * _poisson_p99(rate * crowded_step / 1e3),
            prefill_ms=step + prompt * (1 + rate * step / 1e3),
            adapters=self.distinct(seen)[0],
        )

    def most(self) -> float:
        """Requests a second at which steps reach `MOST_SEQUENCES`."""
        step = self.step_ms(MOST_SEQUENCES)
        prefill = self.requests.prompt * self.costs.prompt_token
        # n = rate · new · step / (1 − rate · prefill), solved for the rate
        return 1e3 * MOST_SEQUENCES / (self.requests.new * step + MOST_SEQUENCES * prefill)

    def step_ms(self, sequences: float) -> float:
        """A decode step of so many sequences, whose adapters come by their shares."""
        _, num_bytes = self.distinct(sequences)
        first = num_bytes * min(1.0, 1 / max(1.0, self.distinct(sequences)[0]))
        context = self.requests.prompt + self.requests.new / 2
        return self.costs.step_ms(sequences, num_bytes - first, self.kv_bytes_per_token, context)

    def distinct(self, sequences: float) -> tuple[float, float]:
        """Distinct adapters of so many sequences, and their bytes."""
        there = 1 - (1 - self.shares) ** sequences
        return float(there.sum()), float(there @ self.sizes)

    def _needed(self, rate: float, prefill: float, sequences: float) -> float:
        return rate * self.requests.new * self.step_ms(sequences) / 1e3 / (1 - prefill)


def _poisson_p99(mean: float) -> float:
    """How many come at the 99th percentile where `mean` come on average."""
    count, term = 0, float(np.exp(-mean))
    reached = term
    while reached < 0.99 and count < 1000:
        count += 1
        term *= mean / count
        reached += term
    return float(count)
