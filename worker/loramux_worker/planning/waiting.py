"""Time to the first token: the step under way, one's own prompt, and the way of the adapter."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loramux_worker.planning.batching import Batch

_PARTS = 200  # of the step under way when a request comes


@dataclass(frozen=True, kw_only=True)
class FirstToken:
    """Milliseconds from the engine's taking a request to its first token. Kafka's part comes to it: tens of them."""

    mean: float
    p50: float
    p99: float


def first_token(batch: Batch, found: tuple[float, ...], load_seconds: tuple[float, ...]) -> FirstToken:
    """Of a mixture: by where the adapter is found (shares, by tier), what it waits for (seconds, by tier)."""
    step = (np.arange(_PARTS) + 0.5) / _PARTS * batch.step_ms + batch.prefill_ms
    times = (step[None, :] + 1e3 * np.array(load_seconds)[:, None]).ravel()
    weights = np.repeat(np.array(found) / _PARTS, _PARTS)
    order = np.argsort(times)
    reached = np.cumsum(weights[order]) / weights.sum()

    def at(quantile: float) -> float:
        return float(times[order][min(int(np.searchsorted(reached, quantile)), len(times) - 1)])

    return FirstToken(mean=float(times @ weights / weights.sum()), p50=at(0.5), p99=at(0.99))
