"""`loramux top`: what workers do now."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from loramux_worker.errors import ConfigurationError


def top(
    urls: Annotated[
        list[str] | None, typer.Argument(metavar="URL…", help="Workers' HTTP addresses (default: 127.0.0.1:9400).")
    ] = None,
    every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.2)] = 2.0,
) -> None:
    """Watch workers in the terminal: throughput, lag, batches, tiers, the busiest and the slowest adapters, errors.

    It reads `/metrics` of each and needs neither Kafka nor a GPU. q ends it, p pauses.
    """
    from loramux_worker.top.screen import Top  # first of all textual: what is missing without it is the extra `top`
    from loramux_worker.top.snapshot import metrics_url

    pages = [metrics_url(url) for url in urls or ["127.0.0.1:9400"]]
    if not sys.stdout.isatty():
        raise ConfigurationError("top draws on a terminal: for a pipe or a file, read a worker's /metrics")
    Top(list(dict.fromkeys(pages)), every).run()
