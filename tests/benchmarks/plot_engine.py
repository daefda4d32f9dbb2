"""Draw the decode steps of `bench_engine.py` beside their byte floor.

python tests/benchmarks/plot_engine.py tests/benchmarks/results/engine-8b-h200.json engine.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_MIXES = {"base": ("no adapter", "C0"), "one": ("one adapter", "C1"), "distinct": ("every row its own adapter", "C2")}


def main() -> None:
    """Read the figures of one run and write a PNG."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    source, target = map(Path, sys.argv[1:])
    draw(json.loads(source.read_text()), target)
    print(target)


def draw(figures: dict[str, Any], target: Path) -> None:
    """Milliseconds of a step by batch size, and what the bytes alone would take."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for mix, (label, color) in _MIXES.items():
        rows = [row for row in figures["steps"] if row["mix"] == mix]
        batches = [row["batch"] for row in rows]
        axes.plot(batches, [row["step_ms"] for row in rows], "o-", color=color, label=label)
        axes.plot(batches, [row["floor_ms"] for row in rows], ":", color=color)
    axes.plot([], [], ":", color="gray", label="byte floor")
    axes.set_xscale("log", base=2)
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("sequences in the batch")
    axes.set_ylabel("ms per decode step")
    axes.set_title(f"Llama {figures['shape'].upper()} shape, bf16, rank 16 on all seven linears, {figures['gpu']}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    main()
