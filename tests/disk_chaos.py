"""A worker that reads adapters through a shared disk tier without rest, for a test that kills it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
from multiprocessing.connection import Connection
from pathlib import Path

import structlog

from loramux_schemas import AdapterName
from loramux_worker.adapters import transfer
from loramux_worker.adapters.catalog import AdapterCatalog
from loramux_worker.adapters.disk import DiskTier
from loramux_worker.adapters.store import AdapterStore
from loramux_worker.errors import RequestFailed

NAMES = [f"adapter-{i}" for i in range(12)]
CONFIG = b'{"r": 8}'
QUOTA = 4 * 300_000  # about four of them
READERS = 3


def weights_of(name: str) -> bytes:
    """What an adapter holds: no two bytes ranges are alike, and sizes differ."""
    generator = random.Random(name)
    return generator.randbytes(generator.randrange(100_000, 400_000))


def write_store(folder: Path) -> None:
    for name in NAMES:
        (folder / name).mkdir(parents=True)
        (folder / name / "adapter_config.json").write_bytes(CONFIG)
        (folder / name / "adapter_model.safetensors").write_bytes(weights_of(name))


def work(cache: Path, store: Path, complaints: Path, seed: int, ready: Connection) -> None:
    """Never returns. A line in `complaints` is a promise that was broken."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(50))
    transfer.PART_BYTES = 1 << 16
    try:
        asyncio.run(_work(cache, store, complaints, random.Random(seed), ready))
    except BaseException as error:
        _complain(complaints, f"worker ended: {error!r}")
        raise


async def _work(cache: Path, store: Path, complaints: Path, generator: random.Random, ready: Connection) -> None:
    expected = {name: hashlib.sha256(weights_of(name)).digest() for name in NAMES}
    disk = DiskTier(cache, QUOTA)
    catalog = AdapterCatalog(
        AdapterStore(f"file://{store}/{{adapter_id}}"), disk, revision_ttl=0.01, adapter_timeout=20.0
    )

    async def read() -> None:
        while True:
            name = NAMES[min(int(generator.paretovariate(0.7)) - 1, len(NAMES) - 1)]
            try:
                reference = await catalog.acquire(AdapterName(name))
            except RequestFailed as failure:
                _complain(complaints, f"{name}: {failure}")
                continue
            try:
                for _ in range(2):
                    content = (Path(reference.path) / "adapter_model.safetensors").read_bytes()
                    if hashlib.sha256(content).digest() != expected[name]:
                        _complain(complaints, f"{name}: corrupt")
                    await asyncio.sleep(generator.uniform(0, 0.005))
            except OSError as error:
                _complain(complaints, f"{name}: left while leased: {error}")
            finally:
                catalog.release(reference)

    ready.send(os.getpid())
    await asyncio.gather(*(read() for _ in range(READERS)))


def _complain(complaints: Path, line: str) -> None:
    with complaints.open("a") as file:
        file.write(f"{line}\n")
