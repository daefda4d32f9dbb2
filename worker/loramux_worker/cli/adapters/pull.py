"""`loramux adapters pull`: into the disk tier, ahead of the worker."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loramux_worker.cli.adapters.options import (
    AdapterUri,
    ConfigFile,
    Timeout,
    quiet_logs,
    required_uri,
    worker_settings,
)
from loramux_worker.cli.adapters.terminal import byte_progress
from loramux_worker.errors import RequestFailed

if TYPE_CHECKING:
    from loramux_schemas import AdapterName
    from loramux_worker.adapters.disk import DiskTier
    from loramux_worker.adapters.store import AdapterStore
    from loramux_worker.engine.protocol import AdapterReference


def pull(
    adapters: Annotated[list[str], typer.Argument(metavar="ID…", help="Adapter ids, or id@revision.")],
    adapter_uri: AdapterUri = None,
    disk_cache: Annotated[
        Path | None, typer.Option(help="Folder of the disk tier: the worker's. Default: the user's cache folder.")
    ] = None,
    disk_quota: Annotated[
        str | None, typer.Option(metavar="BYTES", help="What the disk tier may take, the worker's: 20GiB.")
    ] = None,
    timeout: Timeout = 600.0,
    config: ConfigFile = None,
) -> None:
    """Fetch adapters into the disk tier as a worker does, so that a worker on this machine need not.

    Prints each id and the revision that the store holds now. Give it what
    the worker has: the same --adapter-uri, --disk-cache and --disk-quota,
    or the environment or TOML file that hold them. It is safe beside
    running workers. What is there already is only verified.

    Exit code: 0 when all are there, 1 when one could not be had,
    2 for a wrong option.

    Example: loramux adapters pull acme/pirate acme/spanish
    --adapter-uri 's3://bucket/adapters/{adapter_id}'
    """
    settings = worker_settings(
        model="unused", adapter_uri=adapter_uri, disk_cache=disk_cache, disk_quota=disk_quota, config=config
    )
    uri = required_uri(settings)
    quiet_logs()

    from loramux_worker.adapters.disk import DiskTier
    from loramux_worker.cli.adapters.sources import WatchedStore, parse_name, reason_of

    names = [parse_name(adapter) for adapter in dict.fromkeys(adapters)]
    with byte_progress(f"{len(names)} adapters" if len(names) > 1 else str(names[0])) as progress:
        store = WatchedStore(uri, timeout, progress)
        disk = DiskTier(settings.disk_cache, settings.disk_quota)
        outcomes = asyncio.run(_pull(names, store, disk, timeout))
    failures = 0
    for name, outcome in zip(names, outcomes, strict=True):
        if isinstance(outcome, RequestFailed):
            failures += 1
            typer.echo(f"loramux: {name}: {reason_of(outcome)} ({outcome.code.value})", err=True)
        elif not Path(outcome.path).is_dir():
            failures += 1
            typer.echo(f"loramux: {name}: evicted again: --disk-quota is too small for all of them", err=True)
        else:
            typer.echo(f"{name.adapter_id}  {outcome.revision}")
    if failures:
        raise typer.Exit(1)


async def _pull(
    names: list[AdapterName], store: AdapterStore, disk: DiskTier, timeout: float
) -> list[AdapterReference | RequestFailed]:
    """What became of each: its place on disk, or why it has none."""
    from loramux_worker.cli.adapters.sources import Fetcher

    fetcher = Fetcher(store, disk, timeout)

    async def fetch(name: AdapterName) -> AdapterReference | RequestFailed:
        try:
            return await fetcher.fetch(name)
        except RequestFailed as failure:
            return failure

    try:
        return await asyncio.gather(*map(fetch, names))
    finally:
        await fetcher.close()
