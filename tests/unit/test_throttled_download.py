"""Adapters from a web server, one of them slow: nobody else waits for it, and it waits no longer than it may."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from loramux_schemas import AdapterName, ErrorCode
from loramux_worker.adapters.catalog import AdapterCatalog
from loramux_worker.adapters.disk import DiskTier
from loramux_worker.adapters.store import AdapterStore
from loramux_worker.engine.protocol import AdapterReference
from loramux_worker.errors import RequestFailed
from web_server import WebServer, serving

OTHERS = [f"quick-{i}" for i in range(30)]
SLOW = "/slow/adapter_model.safetensors"
CONTENT = bytes(range(256)) * 8192  # 2 MiB


@pytest.fixture
def web() -> Iterator[WebServer]:
    with serving(WebServer()) as server:
        for name in [*OTHERS, "slow"]:
            server.files[f"/{name}/adapter_config.json"] = b"{}"
            server.files[f"/{name}/adapter_model.safetensors"] = CONTENT + name.encode()
        yield server


@pytest.fixture
async def open_catalog(web: WebServer, tmp_path: Path) -> AsyncIterator[Callable[..., AdapterCatalog]]:
    catalogs = []

    def open_catalog(timeout: float = 30.0) -> AdapterCatalog:
        store = AdapterStore(f"{web.url}/{{adapter_id}}", timeout=timeout)
        disk = DiskTier(tmp_path / "cache", 1 << 30)
        catalogs.append(AdapterCatalog(store, disk, revision_ttl=60.0, adapter_timeout=timeout, max_downloads=2))
        return catalogs[-1]

    yield open_catalog
    for catalog in catalogs:
        await catalog.close()


async def fetch(catalog: AdapterCatalog, adapter_id: str) -> AdapterReference:
    return await catalog.fetch(AdapterName(adapter_id))


async def fetch_others(catalog: AdapterCatalog) -> float:
    """Seconds until all of them are here."""
    started = time.perf_counter()
    await asyncio.gather(*(fetch(catalog, name) for name in OTHERS))
    return time.perf_counter() - started


async def until_sending(web: WebServer) -> None:
    async with asyncio.timeout(10):
        while not web.requests[f"GET {SLOW}"] or not web.running:  # noqa: ASYNC110 (a thread's count)
            await asyncio.sleep(0.005)


async def test_adapter_that_takes_twenty_seconds_delays_nobody(
    web: WebServer, open_catalog: Callable[..., AdapterCatalog]
) -> None:
    catalog = open_catalog()
    web.throttled = {SLOW: 20.0}
    slow = asyncio.create_task(fetch(catalog, "slow"))
    await until_sending(web)
    assert await fetch_others(catalog) < 10
    assert not slow.done()
    slow.cancel()


async def test_adapter_that_takes_longer_than_it_may_is_unavailable(
    web: WebServer, open_catalog: Callable[..., AdapterCatalog], tmp_path: Path
) -> None:
    catalog = open_catalog(timeout=1.0)
    web.throttled = {SLOW: 60.0}
    slow = asyncio.create_task(fetch(catalog, "slow"))
    await until_sending(web)
    assert (await fetch(catalog, "quick-0")).adapter_id == "quick-0"
    with pytest.raises(RequestFailed, match=r"did not arrive within 1 s|does not answer") as failure:
        await slow
    assert failure.value.code == ErrorCode.ADAPTER_UNAVAILABLE
    assert not list((tmp_path / "cache" / "incoming").glob("*/*"))
    web.throttled = {}
    assert (await fetch(catalog, "slow")).adapter_id == "slow"


async def test_server_that_falls_silent_harms_only_what_is_not_here(
    web: WebServer, open_catalog: Callable[..., AdapterCatalog]
) -> None:
    catalog = open_catalog(timeout=1.0)
    here = await fetch(catalog, "quick-0")
    web.stalls[SLOW] = 100
    waiting = [asyncio.create_task(fetch(catalog, "slow")) for _ in range(5)]
    assert await fetch(catalog, "quick-0") == here
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert [outcome.code for outcome in outcomes if isinstance(outcome, RequestFailed)] == [
        ErrorCode.ADAPTER_UNAVAILABLE
    ] * 5
    assert await fetch(catalog, "quick-0") == here
