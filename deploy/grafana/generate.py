"""Writes the Grafana dashboards: `python deploy/grafana/generate.py`, after every change of this folder.

fleet     all workers of a job: is the service well, and if not, which part of a request's way is it?
worker    one worker after the other: batches, KV cache, partitions
adapter   who asks, who waits, who fails
tiers     where adapters are, and what it costs to bring them nearer
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from adapter import adapter
from fleet import fleet
from grafana_foundation_sdk.builders.dashboard import Dashboard
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from tiers import tiers
from worker import worker

FOLDER = Path(__file__).resolve().parent / "dashboards"


def write(folder: Path, dashboards: Iterable[Dashboard]) -> None:
    """One JSON file a dashboard, named after it."""
    folder.mkdir(parents=True, exist_ok=True)
    for dashboard in dashboards:
        built = dashboard.build()
        name = str(built.uid).removeprefix("loramux-")
        text = JSONEncoder(sort_keys=True, indent=1).encode(built)
        (folder / f"{name}.json").write_text(f"{text}\n")


def main() -> None:
    """Write them where the command line says."""
    parser = argparse.ArgumentParser(description="write the Grafana dashboards")
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder (default: dashboards, beside this file)")
    write(parser.parse_args().out, (fleet(), worker(), adapter(), tiers()))


if __name__ == "__main__":
    main()
