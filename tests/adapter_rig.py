"""An adapter catalog over a store that a test opens, closes, slows down and changes at will."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from loramux_schemas import AdapterName, ErrorCode
from loramux_worker.adapters.catalog import AdapterCatalog
from loramux_worker.adapters.disk import DiskTier
from loramux_worker.adapters.revisions import FileDigest, digest_folder
from loramux_worker.adapters.source import StoreChanged, StoredFile
from loramux_worker.engine.protocol import AdapterMoved, AdapterReference
from loramux_worker.errors import RequestFailed

TTL = 60.0
CONFIG = b'{"r": 8}'
SECONDS = 30.0


class Gate:
    """Something that a download waits for; it tells the test that it waits."""

    def __init__(self) -> None:
        self.reached = asyncio.Event()
        self.open = asyncio.Event()

    async def pass_through(self) -> None:
        self.reached.set()
        await self.open.wait()


@dataclass
class FakeStore:
    """Adapters in memory. `gates` holds up downloads, `list_gates` listings, `failure` stands for an outage."""

    weights: dict[str, bytes] = field(default_factory=dict)
    gates: dict[str, Gate] = field(default_factory=dict)
    list_gates: dict[str, Gate] = field(default_factory=dict)
    failure: RequestFailed | None = None
    listings: Counter[str] = field(default_factory=Counter)
    downloads: Counter[str] = field(default_factory=Counter)
    on_download: Callable[[str], None] = lambda adapter_id: None
    running: int = 0
    most_running: int = 0

    def uri(self, adapter_id: str) -> str:
        return f"fake://{adapter_id}"

    async def list(self, adapter_id: str) -> tuple[StoredFile, ...]:
        self.listings[adapter_id] += 1
        if (gate := self.list_gates.get(adapter_id)) is not None:
            await gate.pass_through()
        if self.failure is not None:
            raise self.failure
        if (weights := self.weights.get(adapter_id)) is None:
            raise RequestFailed(ErrorCode.ADAPTER_NOT_FOUND, f"there is no adapter '{adapter_id}' in the store")
        return (
            StoredFile("adapter_config.json", len(CONFIG), "1"),
            StoredFile("adapter_model.safetensors", len(weights), hashlib.md5(weights).hexdigest()),
        )

    async def download(self, adapter_id: str, file: StoredFile, destination: Path) -> FileDigest:
        content = CONFIG
        if file.name == "adapter_model.safetensors":
            self.downloads[adapter_id] += 1
            self.running += 1
            self.most_running = max(self.most_running, self.running)
            self.on_download(adapter_id)
            try:
                if (gate := self.gates.get(adapter_id)) is not None:
                    await gate.pass_through()
            finally:
                self.running -= 1
            content = self.weights[adapter_id]
            if hashlib.md5(content).hexdigest() != file.version:
                raise StoreChanged("changed")
        if self.failure is not None:
            raise self.failure
        destination.write_bytes(content)
        return FileDigest(file.name, len(content), hashlib.sha256(content).hexdigest())


class Clock:
    """Time that passes when the test says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Rig:
    """A catalog over a fake store in a temporary folder."""

    root: Path
    store: FakeStore = field(default_factory=FakeStore)
    clock: Clock = field(default_factory=Clock)
    timeout: float = SECONDS
    patience: float = SECONDS
    quota: int = 1 << 20
    loads: list[AdapterMoved] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.open()

    def open(self) -> None:
        self.disk = DiskTier(self.root, self.quota)
        self.catalog = AdapterCatalog(
            self.store,
            self.disk,
            revision_ttl=TTL,
            adapter_timeout=self.timeout,
            patience=self.patience,
            clock=self.clock,
            on_load=self.loads.append,
        )

    async def restart(self) -> None:
        await self.catalog.close()
        self.open()

    async def fetch(self, name: str) -> AdapterReference:
        async with asyncio.timeout(SECONDS):
            return await self.catalog.fetch(AdapterName.parse(name))

    def start(self, name: str) -> asyncio.Task[AdapterReference]:
        return asyncio.create_task(self.fetch(name))

    async def refusal(self, name: str) -> RequestFailed:
        with pytest.raises(RequestFailed) as failure:
            await self.fetch(name)
        return failure.value


def weights(reference: AdapterReference) -> bytes:
    return (Path(reference.path) / "adapter_model.safetensors").read_bytes()


def outage() -> RequestFailed:
    return RequestFailed(ErrorCode.ADAPTER_UNAVAILABLE, "the adapter store does not answer")


async def reached(gate: Gate) -> None:
    async with asyncio.timeout(SECONDS):
        await gate.reached.wait()


async def until_blocked() -> None:
    """Lets every task that can go on do so."""
    for _ in range(20):
        await asyncio.sleep(0)


def write_files(folder: Path, content: bytes) -> tuple[FileDigest, ...]:
    """An adapter of len(content) bytes in two files."""
    half = len(content) // 2
    (folder / "adapter_config.json").write_bytes(content[:half])
    (folder / "adapter_model.safetensors").write_bytes(content[half:])
    return digest_folder(folder)


async def store(disk: DiskTier, content: bytes) -> str:
    async with disk.incoming(len(content)) as folder:
        return await disk.adopt(folder, write_files(folder, content))


def read(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.iterdir()))


def corrupt(folder: Path) -> None:
    """Another last byte; the size stays."""
    path = folder / "adapter_model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
