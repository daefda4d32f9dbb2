"""The disk tier: quota, leases, restarts, other processes, and disks that fail."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from adapter_rig import corrupt, read, store, until_blocked, write_files
from loramux_schemas import ErrorCode
from loramux_worker.adapters.disk import DiskTier
from loramux_worker.adapters.revisions import FileDigest, KnownRevisions, revision_of
from loramux_worker.errors import ConfigurationError, RequestFailed


def test_revision_names_every_byte_and_every_name() -> None:
    config, weights = (
        FileDigest("adapter_config.json", 2, "aa"),
        FileDigest("adapter_model.safetensors", 3, "bb"),
    )
    revision = revision_of([config, weights])
    assert revision == revision_of([weights, config])
    assert revision.startswith("sha256:")
    assert len(revision) == len("sha256:") + 64
    others = [
        [config],
        [config, FileDigest(weights.name, 4, "bb")],
        [config, FileDigest(weights.name, 3, "cc")],
        [config, FileDigest("model.safetensors", 3, "bb")],
    ]
    assert revision not in [revision_of(files) for files in others]


async def test_quota_lowered_between_two_runs_evicts_the_least_recently_used(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 300)
    first, second, third = [await store(disk, bytes([letter]) * 100) for letter in b"abc"]
    await disk.get(first)
    await disk.close()

    disk = DiskTier(tmp_path, 200)
    assert await disk.get(second) is None
    assert await disk.get(first) is not None
    assert await disk.get(third) is not None
    assert disk.evictions == 1
    await disk.close()


async def test_download_waits_for_a_lease_to_end(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 100)
    leased = await store(disk, b"a" * 80)
    assert disk.acquire(leased)
    waiting = asyncio.create_task(store(disk, b"b" * 80))
    await until_blocked()
    assert not waiting.done()
    disk.release(leased)
    async with asyncio.timeout(10):
        assert await disk.get(await waiting) is not None
    assert await disk.get(leased) is None
    await disk.close()


async def test_parallel_downloads_stay_under_the_quota(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 250)
    async with asyncio.timeout(30):
        await asyncio.gather(*(store(disk, bytes([letter]) * 100) for letter in range(40)))
    disk.check_integrity()
    assert len(disk) == 2
    assert disk.evictions == 38
    await disk.close()


async def test_failed_download_leaves_nothing(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 100)

    async def fail() -> None:
        async with disk.incoming(90) as folder:
            (folder / "adapter_config.json").write_bytes(b"half")
            raise RuntimeError("connection lost")

    with pytest.raises(RuntimeError, match="connection lost"):
        await fail()
    assert await disk.get(await store(disk, b"b" * 90)) is not None
    assert [path.name for path in (tmp_path / "incoming").glob("*/*")] == []
    await disk.close()


async def test_many_readers_of_an_unverified_folder_wait_for_one_digest(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 1000)
    good, bad = await store(disk, b"a" * 100), await store(disk, b"b" * 100)
    await disk.close()
    corrupt(disk.folder_of(bad))

    disk = DiskTier(tmp_path, 1000)
    assert not disk.acquire(good), "nothing may read a folder that has not been verified"
    assert await asyncio.gather(*(disk.get(good) for _ in range(20))) == [disk.folder_of(good)] * 20
    assert await asyncio.gather(*(disk.get(bad) for _ in range(20))) == [None] * 20
    assert not disk.folder_of(bad).exists()
    disk.check_integrity()
    await disk.close()


async def test_truncated_and_emptied_folders_are_fetched_again(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 1000)
    truncated, emptied = await store(disk, b"a" * 100), await store(disk, b"b" * 100)
    await disk.close()
    (disk.folder_of(truncated) / "adapter_model.safetensors").write_bytes(b"")
    for path in disk.folder_of(emptied).iterdir():
        path.unlink()

    disk = DiskTier(tmp_path, 1000)
    assert await store(disk, b"a" * 100) == truncated
    assert read(disk.folder_of(truncated)) == b"a" * 100
    assert await disk.get(emptied) is None
    disk.check_integrity()
    await disk.close()


async def test_two_processes_write_the_same_revision_at_once(tmp_path: Path) -> None:
    one, other = DiskTier(tmp_path, 1000), DiskTier(tmp_path, 1000)
    async with one.incoming(100) as mine, other.incoming(100) as theirs:
        files = write_files(mine, b"a" * 100)
        assert write_files(theirs, b"a" * 100) == files
        revision = await one.adopt(mine, files)
        assert await other.adopt(theirs, files) == revision
    for disk in (one, other):
        assert await disk.get(revision) == disk.folder_of(revision)
        disk.check_integrity()
        await disk.close()
    assert list((tmp_path / "incoming").iterdir()) == []


async def test_revision_comes_and_goes_by_another_process(tmp_path: Path) -> None:
    one, other = DiskTier(tmp_path, 1000), DiskTier(tmp_path, 100)
    revision = await store(other, b"a" * 100)
    assert await one.get(revision) == one.folder_of(revision)
    await store(other, b"b" * 100)
    assert await one.get(revision) is None
    assert not one.acquire(revision)
    one.check_integrity()
    await one.close()
    await other.close()


KILLED = """
import asyncio, pathlib, sys
from loramux_worker.adapters.disk import DiskTier

async def main():
    async with DiskTier(sys.argv[1], 1000).incoming(100) as folder:
        (folder / "adapter_config.json").write_bytes(b"half")
        print(folder, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


async def test_download_of_a_killed_process_is_cleared_away_and_that_of_a_living_one_is_not(
    tmp_path: Path,
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", KILLED, str(tmp_path)),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    try:
        folder = Path((await process.stdout.readline()).decode().strip())
        await DiskTier(tmp_path, 1000).close()
        assert (folder / "adapter_config.json").exists()
    finally:
        process.kill()
        await process.wait()
    disk = DiskTier(tmp_path, 1000)
    assert not folder.exists()
    await disk.close()


async def test_names_survive_a_restart_while_their_revision_does(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 100)
    gone, kept = "sha256:" + "0" * 64, await store(disk, b"a" * 100)
    known = KnownRevisions().with_current("print 1", gone).with_current("print 2", kept)
    disk.index.put("s3://bucket/kept", known)
    disk.index.put("s3://bucket/gone", KnownRevisions().with_current("print", gone))
    disk.index.put("s3://bucket/forgotten", known)
    disk.index.forget("s3://bucket/forgotten")
    await disk.close()
    (tmp_path / "names" / "0.json").write_bytes(b'{"history": [["print", "../../etc"]]}')

    disk = DiskTier(tmp_path, 100)
    assert disk.index.get("s3://bucket/kept") == known
    assert known.current == kept
    assert known.find("print 1") == gone
    assert [disk.index.get(f"s3://bucket/{name}").current for name in ("gone", "forgotten")] == [None, None]
    assert len(list((tmp_path / "names").iterdir())) == 1
    await disk.close()


@pytest.mark.parametrize("revision", ["v2", "sha256:../../etc", "sha256:" + "A" * 64, ""])
async def test_what_is_no_digest_is_not_looked_for(tmp_path: Path, revision: str) -> None:
    disk = DiskTier(tmp_path, 100)
    assert await disk.get(revision) is None
    await disk.close()


async def test_full_disk_is_said(tmp_path: Path) -> None:
    disk = DiskTier(tmp_path, 10**18)
    with pytest.raises(RequestFailed, match="disk of the adapter cache is full") as failure:
        async with disk.incoming(10**17):
            pass
    assert failure.value.code == ErrorCode.ADAPTER_UNAVAILABLE
    await disk.close()


def test_cache_that_cannot_be_used_names_the_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(ConfigurationError, match=r"--disk-cache: .*file/cache cannot be used: Not a directory"):
        DiskTier(tmp_path / "file" / "cache", 100)
    with pytest.raises(ConfigurationError, match="--disk-quota"):
        DiskTier(tmp_path, 0)
