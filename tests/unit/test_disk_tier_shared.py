"""One folder, several tiers: what two processes on a host promise each other. Locks tell tiers apart like processes."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from adapter_rig import CONFIG, FakeStore, Gate, Rig, corrupt, reached, read, store, until_blocked, weights
from loramux_schemas import ErrorCode
from loramux_worker.adapters.disk import DiskTier
from loramux_worker.adapters.revisions import FileDigest
from loramux_worker.adapters.source import StoredFile

SECONDS = 30.0


@asynccontextmanager
async def tiers(root: Path, quota: int, count: int = 2) -> AsyncIterator[list[DiskTier]]:
    tiers = [DiskTier(root, quota) for _ in range(count)]
    try:
        async with asyncio.timeout(SECONDS):
            yield tiers
    finally:
        for tier in tiers:
            await tier.close()
    next_one = DiskTier(root, quota)
    assert next_one.evictions == 0
    next_one.check_integrity()
    await next_one.close()
    assert not [*(root / "incoming").iterdir(), *(root / "arriving").iterdir()]


async def test_what_one_leases_the_other_does_not_evict(tmp_path: Path) -> None:
    async with tiers(tmp_path, 250) as (one, other):
        leased, idle = await store(one, b"a" * 100), await store(one, b"b" * 100)
        assert one.acquire(leased)
        await store(other, b"c" * 100)
        assert read(one.folder_of(leased)) == b"a" * 100
        assert await one.get(idle) is None
        waiting = asyncio.create_task(store(other, b"d" * 200))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        one.release(leased)
        assert await other.get(await waiting) is not None
        assert not one.acquire(leased)


async def test_quota_is_one_for_all(tmp_path: Path) -> None:
    async with tiers(tmp_path, 250, 3) as shared:
        await asyncio.gather(
            *(store(tier, bytes([letter, number]) * 50) for number, tier in enumerate(shared) for letter in range(10))
        )
        assert len([path for path in tmp_path.iterdir() if len(path.name) == 64]) == 2


async def test_unfinished_downloads_of_others_count(tmp_path: Path) -> None:
    async with tiers(tmp_path, 250) as (one, other):
        async with one.incoming(200):
            waiting = asyncio.create_task(store(other, b"a" * 100))
            await asyncio.sleep(0.05)
            assert not waiting.done()
        await waiting


async def test_use_by_another_keeps_an_adapter(tmp_path: Path) -> None:
    async with tiers(tmp_path, 300) as (one, other):
        popular, once = await store(one, b"a" * 100), await store(one, b"b" * 100)
        assert await other.get(popular) is not None  # digested: this tier has not written it
        assert other.acquire(popular)
        other.release(popular)
        await store(one, b"c" * 200)
        assert await one.get(popular) is not None
        assert await one.get(once) is None


async def test_corrupt_folder_that_another_leases_is_replaced(tmp_path: Path) -> None:
    async with tiers(tmp_path, 1000) as (one, other):
        revision = await store(one, b"a" * 100)
        assert one.acquire(revision)
        corrupt(one.folder_of(revision))
        assert await other.get(revision) is None
        assert await store(other, b"a" * 100) == revision
        assert read(other.folder_of(revision)) == b"a" * 100
        assert await one.get(revision) is not None
        assert one.acquire(revision), "a lease of the new folder"
        one.release(revision)
        await_evicted = asyncio.create_task(store(other, b"b" * 950))
        await asyncio.sleep(0.05)
        assert not await_evicted.done()
        one.release(revision)
        await await_evicted


async def test_workers_that_want_the_same_adapter_download_it_once(tmp_path: Path) -> None:
    one, other = Rig(tmp_path), Rig(tmp_path)
    gate = Gate()
    for rig in (one, other):
        rig.store.weights = {"acme/support": b"support"}
        rig.store.gates = {"acme/support": gate}
    first = one.start("acme/support")
    await reached(gate)
    second = other.start("acme/support")
    await until_blocked()
    gate.open.set()
    assert weights(await first) == weights(await second) == b"support"
    assert one.store.downloads.total() + other.store.downloads.total() == 1
    assert not list((tmp_path / "arriving").iterdir())
    for rig in (one, other):
        await rig.catalog.close()


async def test_worker_whose_neighbour_fails_downloads_itself(tmp_path: Path) -> None:
    one, other = Rig(tmp_path), Rig(tmp_path)
    gate = one.store.gates["a"] = Gate()
    one.store.weights = other.store.weights = {"a": b"weights"}
    first = one.start("a")
    await reached(gate)
    second = other.start("a")
    await until_blocked()
    await one.catalog.close()
    assert weights(await second) == b"weights"
    await asyncio.gather(first, return_exceptions=True)
    await other.catalog.close()


class FullDisk(FakeStore):
    """Writes to a disk on which `room` bytes fit beside what the tier holds below its quota."""

    root: Path
    room = 0

    async def download(self, adapter_id: str, file: StoredFile, destination: Path) -> FileDigest:
        digest = await super().download(adapter_id, file, destination)
        if sum(path.stat().st_size for path in self.root.rglob("*.safetensors")) > self.room:
            destination.write_bytes(b"")
            raise OSError(errno.ENOSPC, "No space left on device")
        return digest


def full_disk(root: Path, room: int) -> Rig:
    disk = FullDisk({name: name.encode() * 100 for name in "abc"} | {"large": b"x" * 400})
    disk.root, disk.room = root, room
    return Rig(root, disk)


async def test_disk_that_is_full_below_the_quota_makes_room_and_tries_again(tmp_path: Path) -> None:
    rig = full_disk(tmp_path, 250)
    for name in "abcab":
        assert weights(await rig.fetch(name)) == name.encode() * 100
    assert rig.disk.evictions > 0
    rig.disk.check_integrity()
    await rig.catalog.close()


async def test_disk_that_stays_full_is_said_once_and_harms_nobody_else(tmp_path: Path) -> None:
    rig = full_disk(tmp_path, 250)
    await rig.fetch("a")
    failure = await rig.refusal("large")
    assert failure.code == ErrorCode.ADAPTER_UNAVAILABLE
    assert failure.message == "adapter 'large': the disk of the adapter cache is full"
    assert weights(await rig.fetch("a")) == b"a" * 100
    assert not list((tmp_path / "incoming").glob("*/*"))
    await rig.catalog.close()


async def test_full_disk_never_takes_what_is_leased(tmp_path: Path) -> None:
    rig = full_disk(tmp_path, 150)
    with rig.catalog.lease(await rig.fetch("a")) as leased:
        assert "is full" in (await rig.refusal("b")).message
        assert weights(leased) == b"a" * 100
    assert weights(await rig.fetch("b")) == b"b" * 100
    await rig.catalog.close()


async def test_index_that_cannot_be_written_costs_a_download_and_no_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = Rig(tmp_path)
    rig.store.weights = {"a": b"weights"}

    def fail(uri: str, known: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(rig.disk.index, "put", fail)
    assert weights(await rig.fetch("a")) == b"weights"
    assert rig.disk.used_bytes == len(CONFIG) + len(b"weights")
    await rig.catalog.close()
