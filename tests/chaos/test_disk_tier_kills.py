"""Workers that share a disk tier are killed at any point, many times: what is left is whole and within the quota."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import sys
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from disk_chaos import NAMES, QUOTA, weights_of, work, write_store
from loramux_worker.adapters.disk import DiskTier
from loramux_worker.adapters.folder_locks import try_lock

WORKERS = 3
KILLS = 80


class Herd:
    """Workers on one folder. They are processes of their own, forked from a server that has imported everything."""

    def __init__(self, cache: Path, store: Path, complaints: Path) -> None:
        self._paths = (cache, store, complaints)
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["disk_chaos"])
        self._workers: list[BaseProcess] = []
        self._num_started = 0

    def start_one(self) -> None:
        receiver, sender = self._context.Pipe(duplex=False)
        self._num_started += 1
        worker = self._context.Process(target=work, args=(*self._paths, self._num_started, sender), daemon=True)
        worker.start()
        sender.close()
        self._workers.append(worker)
        assert receiver.poll(30), "a worker does not start"
        receiver.recv()
        receiver.close()

    def kill_one(self) -> None:
        worker = self._workers.pop(0)
        worker.kill()  # SIGKILL
        worker.join()
        worker.close()

    def kill_all(self) -> None:
        while self._workers:
            self.kill_one()


def test_killed_workers_leave_nothing_but_whole_adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the fork server imports before it is told a path
    cache, store, complaints = tmp_path / "cache", tmp_path / "store", tmp_path / "complaints"
    write_store(store)
    complaints.touch()
    generator = random.Random(1)
    herd = Herd(cache, store, complaints)
    num_interrupted = 0
    try:
        for _ in range(WORKERS):
            herd.start_one()
        for _ in range(KILLS):
            time.sleep(generator.uniform(0, 0.04))
            herd.kill_one()
            num_interrupted += has_abandoned(cache)
            herd.start_one()
            assert complaints.read_text() == ""
        time.sleep(0.5)  # with what all those have left behind
    finally:
        herd.kill_all()
    assert complaints.read_text() == ""
    assert num_interrupted > KILLS // 10, "kills have met downloads"

    whole = sum(path.stat().st_size for path in cache.glob("?" * 64 + "/*"))
    unfinished = sum(int(path.name.partition("-")[0]) for path in cache.glob("incoming/*/*-*"))
    assert 0 < whole + unfinished <= QUOTA
    asyncio.run(check_what_is_left(cache))


async def check_what_is_left(cache: Path) -> None:
    disk = DiskTier(cache, QUOTA)
    assert len(list((cache / "incoming").iterdir())) == 1  # the new one's own
    assert list((cache / "arriving").iterdir()) == []
    revisions = [f"sha256:{path.name}" for path in cache.iterdir() if len(path.name) == 64]
    contents = {weights_of(name) for name in NAMES}
    for revision in revisions:
        folder = await disk.get(revision)
        assert folder is not None, "its bytes are not those of its name"
        assert (folder / "adapter_model.safetensors").read_bytes() in contents
    disk.check_integrity()
    await disk.close()


def has_abandoned(cache: Path) -> bool:
    """Whether a download lies half done in the folder of a process that is gone."""
    for workspace in cache.glob("incoming/*"):
        if (lock := try_lock(workspace)) is not None:
            try:  # while it is locked nobody clears it up
                return any(workspace.glob("*-*/*"))
            finally:
                os.close(lock)
    return False
