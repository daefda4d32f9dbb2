"""The plan as a picture: latencies by load, hits by room."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from loramux_worker.errors import ConfigurationError
from loramux_worker.planning.sizing import Fleet, Load, Plan, plan


def draw(found: Plan, load: Load, fleet: Fleet, target: Path) -> None:
    """Left, what requests wait for at other rates on as many GPUs; right, where adapters are found with less memory.

    Raises ConfigurationError when the file cannot be written.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    _latencies(left, found, load, fleet)
    _hits(right, found, load, fleet)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    try:
        figure.savefig(target, dpi=90)
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--plot {target}: it cannot be written ({error})") from error
    finally:
        plt.close(figure)


def _latencies(axes: Axes, found: Plan, load: Load, fleet: Fleet) -> None:
    rates = load.rate * np.linspace(0.1, 0.98, 12) * found.most_rate / found.rate
    plans = [_at(replace(load, rate=float(rate)), fleet, found.gpus) for rate in rates]
    drawn = [(rate, at) for rate, at in zip(rates, plans, strict=True) if at is not None]
    xs = [rate for rate, _ in drawn]
    axes.plot(xs, [at.first_token.p99 for _, at in drawn], "C3", label="first token, p99")
    axes.plot(xs, [at.first_token.p50 for _, at in drawn], "C1", label="first token, p50")
    axes.plot(xs, [at.batch.step_p99_ms for _, at in drawn], "C0--", label="between tokens, p99")
    axes.plot(xs, [at.batch.step_ms for _, at in drawn], "C0", label="between tokens, mean")
    axes.axvline(load.rate, color="grey", linewidth=1)
    axes.set(xlabel="requests/s, all workers", ylabel="ms", yscale="log", title=f"at other rates, GPUs: {found.gpus}")


def _hits(axes: Axes, found: Plan, load: Load, fleet: Fleet) -> None:
    shares = np.linspace(0.05, 1.0, 12)
    plans = [_at(load, replace(fleet, host_bytes=share * found.room.host), found.gpus) for share in shares]
    drawn = [(share * found.room.host / 1e9, at) for share, at in zip(shares, plans, strict=True) if at is not None]
    below = np.zeros(len(drawn))
    for place, tier in enumerate(("gpu", "host", "disk", "store")):
        above = below + np.array([at.found[place] for _, at in drawn])
        axes.fill_between([x for x, _ in drawn], below, above, alpha=0.5, label=tier)
        below = above
    axes.set(xlabel="host memory of a worker, GB", ylabel="adapters found in", ylim=(0, 1), title="busiest worker")


def _at(load: Load, fleet: Fleet, gpus: int) -> Plan | None:
    try:
        return plan(load, replace(fleet, utilisation=1.0), gpus)
    except ConfigurationError:
        return None
