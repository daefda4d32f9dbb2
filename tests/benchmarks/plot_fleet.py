"""Draw what `sim_fleet.py` found: balance against hits by k, and what it costs that partitions move."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from fleet_moves import WINDOW
from matplotlib import pyplot as plt


def draw(figures: dict[str, Any], target: Path) -> None:
    """Two panels, of `spread` and `moves`."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.3), layout="constrained")
    rows = [row for row in figures["spread"] if row["zipf"] == 0.6 and row["partitions"] == 4000]
    rows.sort(key=lambda row: row["k"])
    ks = [str(row["k"]) for row in rows]
    left.plot(ks, [row["busiest"] for row in rows], "C3o-", label="busiest worker / mean")
    left.set(xlabel="k, partitions of an adapter", ylabel="requests of the busiest / mean", ylim=(0, None))
    twin = left.twinx()
    twin.plot(ks, [row["gpu"] for row in rows], "C0s-", label="found in the pool")
    twin.plot(ks, [1 - row["store"] for row in rows], "C2s-", label="found on the worker")
    twin.set(ylim=(0, 1.05), ylabel="share of requests")
    left.set_title("1,000 workers, 10⁶ adapters, Zipf(0.6)", fontsize=10)
    lines = left.get_lines() + twin.get_lines()
    left.legend(lines, [line.get_label() for line in lines], fontsize=8, loc="lower left")
    for color, (event, row) in zip(
        ("C3", "C0"), ((n, r) for n, r in figures["moves"].items() if n != "settings"), strict=True
    ):
        windows = [row["store_before"], *row["store_after"]]
        right.plot([place * WINDOW / 1000 for place in range(len(windows))], windows, color, label=event)
    right.set(xlabel="thousand requests after it", ylabel="downloads a request", ylim=(0, None))
    right.set_title("8 workers, partitions move", fontsize=10)
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(target, dpi=80)
