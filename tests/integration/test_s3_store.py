"""Adapters from a real S3 server: arrival, revisions, refusals, outages, and many at once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from obstore.store import S3Store

from loramux_schemas import AdapterName, ErrorCode
from loramux_worker.adapters.catalog import AdapterCatalog
from loramux_worker.adapters.disk import DiskTier
from loramux_worker.adapters.store import AdapterStore
from loramux_worker.engine.protocol import AdapterReference
from loramux_worker.errors import ConfigurationError, RequestFailed
from services.s3 import S3Server

pytestmark = pytest.mark.s3

SECONDS = 60.0
TTL = 60.0


class ThrottledGateway:
    """A proxy in front of an S3 server that holds every GET below `held_place` until `opened` is set."""

    def __init__(self, port: int, held_place: str) -> None:
        self._upstream_port = port
        self._held = f"GET {held_place}".encode()
        self.reached = asyncio.Event()
        self.opened = asyncio.Event()

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[str]:
        """The proxy's URL."""
        connections: set[asyncio.Task[None]] = set()

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            connections.add(asyncio.create_task(self._serve(reader, writer)))

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            for connection in connections:
                connection.cancel()
            await asyncio.gather(*connections, return_exceptions=True)

    async def _serve(self, client: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        upstream, requests = await asyncio.open_connection("127.0.0.1", self._upstream_port)
        copying = asyncio.create_task(self._copy(upstream, answers))
        try:
            while True:  # requests for reading have no body
                head = await client.readuntil(b"\r\n\r\n")
                if head.startswith(self._held):
                    self.reached.set()
                    await self.opened.wait()
                requests.write(head)
        except asyncio.IncompleteReadError:
            pass
        finally:
            copying.cancel()
            for writer in (requests, answers):
                writer.close()
            await asyncio.gather(copying, return_exceptions=True)

    @staticmethod
    async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while chunk := await source.read(1 << 16):
            sink.write(chunk)
            await sink.drain()


class Clock:
    """Time that passes when the test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def environment(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """The variables by which a person points a worker at an S3 server, and nothing else."""
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION"):
        monkeypatch.setenv(name, s3.environment[name])
    monkeypatch.delenv("AWS_ALLOW_HTTP", raising=False)
    return monkeypatch


@asynccontextmanager
async def catalog_of(
    bucket: str, folder: Path, *, timeout: float = SECONDS, clock: Clock | None = None, max_downloads: int = 8
) -> AsyncIterator[AdapterCatalog]:
    catalog = AdapterCatalog(
        AdapterStore(f"s3://{bucket}/adapters/{{adapter_id}}", timeout=timeout),
        DiskTier(folder / "cache", 1 << 30),
        revision_ttl=TTL,
        adapter_timeout=timeout,
        max_downloads=max_downloads,
        patience=SECONDS,
        clock=clock or Clock(),
    )
    try:
        yield catalog
    finally:
        await catalog.close()


async def put(bucket: S3Store, adapter_id: str, weights: bytes) -> None:
    await bucket.put_async(f"adapters/{adapter_id}/adapter_config.json", b'{"r": 8}')
    await bucket.put_async(f"adapters/{adapter_id}/adapter_model.safetensors", weights)


async def fetch(catalog: AdapterCatalog, adapter_id: str) -> AdapterReference:
    async with asyncio.timeout(SECONDS):
        return await catalog.fetch(AdapterName.parse(adapter_id))


async def refusal(catalog: AdapterCatalog, adapter_id: str) -> RequestFailed:
    with pytest.raises(RequestFailed) as failure:
        await fetch(catalog, adapter_id)
    return failure.value


def weights(reference: AdapterReference) -> bytes:
    return (Path(reference.path) / "adapter_model.safetensors").read_bytes()


@pytest.mark.usefixtures("environment")
async def test_adapter_arrives_and_a_new_revision_follows(s3: S3Server, s3_bucket: str, tmp_path: Path) -> None:
    bucket, clock = s3.store(s3_bucket), Clock()
    large = bytes(range(256)) * (48 << 10)  # several chunks
    await put(bucket, "acme/support", large)
    async with catalog_of(s3_bucket, tmp_path, clock=clock) as catalog:
        first = await fetch(catalog, "acme/support")
        assert weights(first) == large
        await put(bucket, "acme/support", b"second")
        assert await fetch(catalog, "acme/support") == first
        clock.now = TTL
        second = await fetch(catalog, "acme/support")
        assert weights(second) == b"second"
        clock.now = 2 * TTL
        assert await fetch(catalog, "acme/support") == second
        assert await fetch(catalog, f"acme/support@{first.revision}") == first
        assert catalog.stats.downloads == 2

        await bucket.delete_async(
            ["adapters/acme/support/adapter_config.json", "adapters/acme/support/adapter_model.safetensors"]
        )
        clock.now = 3 * TTL
        assert (await refusal(catalog, "acme/support")).code == ErrorCode.ADAPTER_NOT_FOUND


@pytest.mark.usefixtures("environment")
async def test_text_comes_with_the_adapter_and_changes_its_revision(
    s3: S3Server, s3_bucket: str, tmp_path: Path
) -> None:
    bucket, clock = s3.store(s3_bucket), Clock()
    await put(bucket, "acme/support", b"weights")
    await bucket.put_async("adapters/acme/support/checkpoint-1/tokenizer.json", b"not its own")
    async with catalog_of(s3_bucket, tmp_path, clock=clock) as catalog:
        revisions = [await fetch(catalog, "acme/support")]
        for content in (b"one", b"two"):
            await bucket.put_async("adapters/acme/support/chat_template.jinja", content)
            clock.now += TTL
            revisions.append(await fetch(catalog, "acme/support"))
        assert len({reference.revision for reference in revisions}) == 3
        texts = [Path(reference.path) / "chat_template.jinja" for reference in revisions]
        assert [text.read_bytes() if text.exists() else None for text in texts] == [None, b"one", b"two"]
        assert not (Path(revisions[2].path) / "tokenizer.json").exists()
        await bucket.delete_async("adapters/acme/support/chat_template.jinja")
        clock.now += TTL
        assert await fetch(catalog, "acme/support") == revisions[0]


@pytest.mark.usefixtures("environment")
async def test_what_is_no_adapter(s3: S3Server, s3_bucket: str, tmp_path: Path) -> None:
    bucket = s3.store(s3_bucket)
    await put(bucket, "acme/support", b"weights")
    await bucket.put_async("adapters/old/adapter_config.json", b"{}")
    await bucket.put_async("adapters/old/adapter_model.bin", b"\x80")
    async with catalog_of(s3_bucket, tmp_path) as catalog:
        for adapter_id in ("nothing", "acme", "acme/sup"):
            assert (await refusal(catalog, adapter_id)).code == ErrorCode.ADAPTER_NOT_FOUND
        pickled = await refusal(catalog, "old")
        assert pickled.code == ErrorCode.ADAPTER_INVALID
        assert "pickle" in pickled.message
        with pytest.raises(ConfigurationError, match="--adapters nothing: there is no adapter 'nothing'"):
            await catalog.preload(["acme/support", "nothing"])
    async with catalog_of("no-such-bucket", tmp_path) as catalog:
        assert (await refusal(catalog, "acme/support")).code == ErrorCode.ADAPTER_UNAVAILABLE


async def test_denied_access_is_an_outage_of_that_store(
    s3: S3Server, s3_bucket: str, tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    await put(s3.store(s3_bucket), "acme/support", b"weights")
    environment.setenv("AWS_SECRET_ACCESS_KEY", "not the key")
    async with catalog_of(s3_bucket, tmp_path) as catalog:
        denied = await refusal(catalog, "acme/support")
        assert denied.code == ErrorCode.ADAPTER_UNAVAILABLE
        assert denied.message == "adapter 'acme/support': the adapter store denies access"


@pytest.mark.usefixtures("environment")
async def test_fifty_adapters_at_once(s3: S3Server, s3_bucket: str, tmp_path: Path) -> None:
    bucket = s3.store(s3_bucket)
    contents = {f"tenant-{i}/lora": bytes([i]) * 100_000 for i in range(50)}
    await asyncio.gather(*(put(bucket, adapter_id, content) for adapter_id, content in contents.items()))
    async with catalog_of(s3_bucket, tmp_path) as catalog:
        # Three requests each.
        references = await asyncio.gather(*(fetch(catalog, adapter_id) for adapter_id in [*contents] * 3))
        assert all(weights(reference) == contents[reference.adapter_id] for reference in references)
        assert catalog.stats.downloads == 50
        catalog.disk.check_integrity()
        assert len(catalog.disk) == 50


async def test_throttled_adapter_delays_nobody_else(
    s3: S3Server, s3_bucket: str, tmp_path: Path, environment: pytest.MonkeyPatch
) -> None:
    bucket = s3.store(s3_bucket)
    names = [f"quick-{i}" for i in range(20)]
    await asyncio.gather(*(put(bucket, name, name.encode()) for name in [*names, "slow"]))
    gateway = ThrottledGateway(s3.port, f"/{s3_bucket}/adapters/slow/")
    async with gateway.serving() as url:
        environment.setenv("AWS_ENDPOINT_URL", url)
        async with catalog_of(s3_bucket, tmp_path, max_downloads=2) as catalog:
            slow = asyncio.create_task(fetch(catalog, "slow"))
            async with asyncio.timeout(SECONDS):
                await gateway.reached.wait()
            references = await asyncio.gather(*(fetch(catalog, name) for name in names))
            assert [weights(reference).decode() for reference in references] == names
            assert not slow.done()
            gateway.opened.set()
            assert weights(await slow) == b"slow"


async def test_server_that_stops_harms_only_what_is_not_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: S3Server
) -> None:
    clock = Clock()
    with S3Server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        bucket = server.create_bucket("adapters")
        await put(server.store(bucket), "known", b"known")
        await put(server.store(bucket), "unknown", b"unknown")
        async with catalog_of(bucket, tmp_path, timeout=1.0, clock=clock) as catalog:
            known = await fetch(catalog, "known")

            server.stop()
            clock.now = TTL
            assert await fetch(catalog, "known") == known
            assert (await refusal(catalog, "unknown")).code == ErrorCode.ADAPTER_UNAVAILABLE

        async with catalog_of(bucket, tmp_path, timeout=1.0, clock=clock) as catalog:
            assert await fetch(catalog, "known") == known, "a worker that starts during the outage"
        server.start()
        async with catalog_of(bucket, tmp_path, clock=clock) as catalog:
            assert weights(await fetch(catalog, "unknown")) == b"unknown"
