"""One file from a source to the disk: in parts, over servers that break, stall, know no ranges or lie."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramux_schemas import ErrorCode
from loramux_worker.adapters import object_source, transfer
from loramux_worker.adapters.source import StoreChanged
from loramux_worker.adapters.store import AdapterStore
from loramux_worker.errors import RequestFailed
from web_server import WebServer, serving

PATH = "/a/adapter_model.safetensors"
CONTENT = random.Random(1).randbytes(5 * (1 << 20) + 17)
PART = 1 << 20


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch) -> Iterator[WebServer]:
    """A server with one adapter of six parts."""
    monkeypatch.setattr(transfer, "PART_BYTES", PART)
    monkeypatch.setattr(object_source, "CHUNK_BYTES", 1 << 16)
    with serving(WebServer()) as server:
        server.files = {"/a/adapter_config.json": b"{}", PATH: CONTENT}
        yield server


async def download(web: WebServer, folder: Path, timeout: float = 30.0) -> bytes:
    store = AdapterStore(f"{web.url}/{{adapter_id}}", timeout=timeout)
    _, weights = await store.list("a")
    web.requests.clear()
    digest = await store.download("a", weights, folder / "weights")
    content = (folder / "weights").read_bytes()
    assert (digest.size, digest.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    return content


async def test_large_file_comes_in_parallel_parts_and_never_more_than_four(web: WebServer, tmp_path: Path) -> None:
    web.throttled = {PATH: 0.2}
    assert await download(web, tmp_path) == CONTENT
    assert web.requests[f"GET {PATH}"] == 6
    assert web.most_running == transfer.PARALLEL_PARTS


@pytest.mark.parametrize("size", [0, 1, PART - 1, PART, PART + 1, 2 * PART])
async def test_every_size_arrives(web: WebServer, tmp_path: Path, size: int) -> None:
    web.files[PATH] = CONTENT[:size]
    assert await download(web, tmp_path) == CONTENT[:size]


async def test_server_without_ranges_sends_one_stream(web: WebServer, tmp_path: Path) -> None:
    web.ranges = False
    assert await download(web, tmp_path) == CONTENT


@pytest.mark.parametrize("etags", [True, False])
async def test_part_that_breaks_off_goes_on_where_it_broke(web: WebServer, tmp_path: Path, etags: bool) -> None:
    web.etags = etags
    web.breaks[PATH] = 3
    assert await download(web, tmp_path) == CONTENT
    assert web.requests[f"GET {PATH}"] == 6 + 3


async def test_stream_without_ranges_that_breaks_off_begins_again(web: WebServer, tmp_path: Path) -> None:
    web.ranges = web.etags = False
    web.breaks[PATH] = 2
    assert await download(web, tmp_path) == CONTENT


async def test_server_that_always_breaks_off_is_given_up(web: WebServer, tmp_path: Path) -> None:
    web.ranges = web.etags = False
    web.broken = {PATH}
    with pytest.raises(RequestFailed, match="does not answer") as failure:
        await download(web, tmp_path)
    assert failure.value.code == ErrorCode.ADAPTER_UNAVAILABLE


@pytest.mark.parametrize("etags", [True, False])
async def test_connection_that_falls_silent_is_left(
    web: WebServer, tmp_path: Path, etags: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_source, "IDLE_TIMEOUT", 0.3)
    web.etags = etags
    web.stalls[PATH] = 2
    async with asyncio.timeout(20):
        assert await download(web, tmp_path) == CONTENT


async def test_content_that_has_changed_since_the_listing_is_never_mixed(web: WebServer, tmp_path: Path) -> None:
    store = AdapterStore(f"{web.url}/{{adapter_id}}")
    _, weights = await store.list("a")
    web.files[PATH] = CONTENT + b"longer"
    with pytest.raises(StoreChanged):
        await store.download("a", weights, tmp_path / "weights")


async def test_full_disk_ends_the_download_with_its_own_error(web: WebServer, tmp_path: Path) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    store = AdapterStore(f"{web.url}/{{adapter_id}}")
    config, _ = await store.list("a")
    with pytest.raises(OSError, match="No space left"):
        await store.download("a", config, tmp_path / "full")


async def test_memory_does_not_grow_with_the_file(web: WebServer, tmp_path: Path) -> None:
    sizes: list[int] = []
    store = AdapterStore(f"{web.url}/{{adapter_id}}", on_bytes=sizes.append)
    _, weights = await store.list("a")
    await store.download("a", weights, tmp_path / "weights")
    assert sum(sizes) == len(CONTENT)
    assert max(sizes) < PART  # what is in memory of one part


async def test_cancelled_download_has_stopped(web: WebServer, tmp_path: Path) -> None:
    web.throttled = {PATH: 20}
    running = asyncio.create_task(download(web, tmp_path))
    while web.running < transfer.PARALLEL_PARTS:  # noqa: ASYNC110 (a thread's count)
        await asyncio.sleep(0.01)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    size = (tmp_path / "weights").stat().st_size
    await asyncio.sleep(0.1)
    assert (tmp_path / "weights").stat().st_size == size
