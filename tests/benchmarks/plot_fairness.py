"""Draw the policies of `sim_fairness.py`: what the light tenants wait, and what the engine does meanwhile.

python tests/benchmarks/plot_fairness.py tests/benchmarks/results/fairness-8b.json fairness.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

_SHOWN = {"first come": "C7", "round robin": "C1", "time slice": "C4", "plain VTC": "C2", "ours": "C0"}


def main() -> None:
    """Read the figures of one run and write a PNG."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    source, target = map(Path, sys.argv[1:])
    draw(json.loads(source.read_text())["rows"], target)
    print(target)


def draw(rows: list[dict[str, Any]], target: Path) -> None:
    """Bars by trace: p99 of the light tenants' time to first token (logarithmic), and tokens a second."""
    traces = [trace for trace in dict.fromkeys(row["trace"] for row in rows) if trace != "quiet"]
    figure, (above, below) = plt.subplots(2, 1, figsize=(8, 5.5), sharex=True, layout="constrained")
    for place, (policy, color) in enumerate(_SHOWN.items()):
        own = {row["trace"]: row for row in rows if row["policy"] == policy}
        xs = [i + (place - 2) * 0.16 for i in range(len(traces))]
        above.bar(xs, [own[trace]["light_ttft_p99_ms"] / 1e3 for trace in traces], 0.15, color=color, label=policy)
        below.bar(xs, [own[trace]["tokens_per_s"] / 1e3 for trace in traces], 0.15, color=color)
    above.set_yscale("log")
    above.set_ylim(top=100)  # room for the legend
    above.set_ylabel("light tenants:\np99 to first token, s")
    above.legend(ncols=5, fontsize=8)
    below.set_ylabel("thousand tokens/s")
    below.set_xticks(range(len(traces)), traces)
    for axes in (above, below):
        axes.grid(axis="y", alpha=0.3)
    above.set_title("Simulated, steps of the Llama 8B shape on one GPU")
    figure.savefig(target, dpi=90)


if __name__ == "__main__":
    main()
