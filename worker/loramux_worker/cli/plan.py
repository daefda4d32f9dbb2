"""`loramux plan`: how many GPUs a load needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from loramux_worker.errors import ConfigurationError


def plan(
    model: Annotated[
        str, typer.Option(help="A model folder or its config.json, or a shape that was measured: 8b, 1b.")
    ] = "8b",
    adapters: Annotated[int, typer.Option(help="How many there are.", min=1, max=1_000_000)] = 1000,
    rank: Annotated[list[int] | None, typer.Option(help="Of the adapters; several: they take turns [16].")] = None,
    zipf: Annotated[float, typer.Option(help="Popularity: 1 / place ** this; 0: all alike.", min=0, max=4)] = 1.0,
    popularity: Annotated[
        Path | None, typer.Option(help="Popularity: a CSV of adapter,count, for --adapters and --zipf.")
    ] = None,
    rate: Annotated[float, typer.Option(help="Requests a second, of all adapters together.", min=1e-6)] = 20.0,
    prompt: Annotated[int, typer.Option(help="Tokens of a prompt.", min=1)] = 512,
    new: Annotated[int, typer.Option(help="Tokens of an answer.", min=1)] = 128,
    gpus: Annotated[int | None, typer.Option(help="As many instead of the fewest that do.", min=1, max=1000)] = None,
    gpu_memory: Annotated[float, typer.Option(help="Of each GPU, GB.", min=1)] = 80.0,
    host_memory: Annotated[float, typer.Option(help="Of each worker for adapters, at most, GB.", min=0.1)] = 64.0,
    disk_quota: Annotated[float, typer.Option(help="Of each worker, at most, GB.", min=0.1)] = 200.0,
    partitions: Annotated[int | None, typer.Option(help="Of the requests topic [8 a GPU].", min=1, max=100_000)] = None,
    shards: Annotated[int, typer.Option(help="Partitions of an adapter: the clients' shards_per_adapter.", min=1)] = 2,
    utilisation: Annotated[
        float, typer.Option(help="Of what the busiest worker could take, at most.", min=0.05, max=0.95)
    ] = 0.7,
    speed: Annotated[float, typer.Option(help="Of the GPU beside an H100.", min=0.01, max=100)] = 1.0,
    download: Annotated[float, typer.Option(help="Of one adapter from the store, MB/s.", min=0.1)] = 200.0,
    plot: Annotated[Path | None, typer.Option(help="A picture (PNG, SVG, PDF) to draw beside the table.")] = None,
) -> None:
    """Say how many GPUs a load needs, how much of each tier, what hits and latencies to expect.

    It goes by step costs that were measured on an H100 and by a model of the fleet, and needs no GPU.

    500 customers with two adapters each on an 8B, 20 requests/s:

        loramux plan --model 8b --adapters 1000 --rank 16 --rate 20 --plot plan.png
    """
    from rich.console import Console

    from loramux_worker.planning.batching import Requests
    from loramux_worker.planning.costs import GB, TierSpeeds
    from loramux_worker.planning.popularity import read_counts
    from loramux_worker.planning.popularity import zipf as zipf_shares
    from loramux_worker.planning.report import show
    from loramux_worker.planning.shape import ModelShape
    from loramux_worker.planning.sizing import Fleet, Load, spread_ranks
    from loramux_worker.planning.sizing import plan as find_plan

    ranks = rank or [16]
    if min(ranks) < 1:
        raise ConfigurationError(f"--rank {min(ranks)}: it must be positive")
    shares = zipf_shares(adapters, zipf) if popularity is None else read_counts(popularity)
    load = Load(
        shape=ModelShape.find(model),
        shares=shares,
        ranks=spread_ranks(len(shares), ranks),
        rate=rate,
        requests=Requests(prompt=prompt, new=new),
    )
    fleet = Fleet(
        gpu_bytes=gpu_memory * GB,
        host_bytes=host_memory * GB,
        disk_bytes=disk_quota * GB,
        partitions=partitions,
        shards=shards,
        utilisation=utilisation,
        speed=speed,
        speeds=TierSpeeds(download=download * 1e6),
    )
    found = find_plan(load, fleet, gpus)
    show(found, load, fleet, Console())
    if plot is not None:
        from loramux_worker.planning.plot import draw

        draw(found, load, fleet, plot)
