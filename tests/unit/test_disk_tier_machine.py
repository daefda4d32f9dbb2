"""The disk tier against a model of it, in any order of downloads, reads, leases and restarts."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from adapter_rig import corrupt, read, store, until_blocked
from loramux_schemas import ErrorCode
from loramux_worker.adapters.disk import DiskTier
from loramux_worker.adapters.eviction import S3Fifo
from loramux_worker.errors import RequestFailed

QUOTA = 250


class DiskTierMachine(RuleBasedStateMachine):
    """The tier holds what S3-FIFO under the same quota keeps. A restart leaves the order of last use, and no more."""

    @initialize()
    def start(self) -> None:
        self.temporary = tempfile.TemporaryDirectory()
        self.root = Path(self.temporary.name) / "cache"
        self.runner = asyncio.Runner()
        self.disk = DiskTier(self.root, QUOTA)
        self.contents: dict[str, bytes] = {}
        self.present: OrderedDict[str, int] = OrderedDict()  # revision → size, least recently used first
        self.policy: S3Fifo[str] = S3Fifo(QUOTA)
        self.new: set[str] = set()  # not leased yet
        self.corrupt: set[str] = set()
        self.leases: Counter[str] = Counter()

    def teardown(self) -> None:
        if hasattr(self, "runner"):
            self.runner.run(self.disk.close())
            self.runner.close()
            self.temporary.cleanup()

    def make_room(self, size: int) -> bool:
        """The model's eviction; whether there is room now."""
        while sum(self.present.values()) + size > QUOTA:
            evicted = self.policy.evict(lambda revision: not self.leases[revision])
            if evicted is None:
                return False
            del self.present[evicted]
            self.corrupt.discard(evicted)
        return True

    def add(self, revision: str, size: int) -> None:
        if revision not in self.present or revision in self.corrupt:
            self.remove(revision)
            self.policy.add(revision, size)
        self.present[revision] = size
        self.present.move_to_end(revision)

    def remove(self, revision: str) -> None:
        if self.present.pop(revision, None) is not None:
            self.policy.remove(revision)
        self.corrupt.discard(revision)

    def unfinished(self) -> list[Path]:
        """What lies in the tier's workspace."""
        (workspace,) = (self.root / "incoming").iterdir()
        return list(workspace.iterdir())

    @rule(letter=st.integers(0, 5), size=st.integers(2, QUOTA + 10))
    def download(self, letter: int, size: int) -> None:
        content = bytes([letter]) * size
        if size > QUOTA:
            with pytest.raises(RequestFailed) as failure:
                self.runner.run(store(self.disk, content))
            assert failure.value.code == ErrorCode.ADAPTER_INVALID
        elif self.make_room(size):
            revision = self.runner.run(store(self.disk, content))
            self.contents[revision] = content
            if revision not in self.present or revision in self.corrupt:
                self.new.add(revision)
            self.add(revision, size)
        else:
            self.runner.run(self.wait_in_vain(content))

    async def wait_in_vain(self, content: bytes) -> None:
        waiting = asyncio.create_task(store(self.disk, content))
        async with asyncio.timeout(30):
            while len(self.disk) > len(self.present) or self.unfinished():  # noqa: ASYNC110 (threads at work)
                await asyncio.sleep(0.001)
        await until_blocked()
        assert not waiting.done(), "a download found room where leases take it all"
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def get(self, data: st.DataObject) -> None:
        revision = data.draw(st.sampled_from(sorted(self.contents)))
        folder = self.runner.run(self.disk.get(revision))
        if revision in self.corrupt:
            self.remove(revision)
        assert (folder is not None) == (revision in self.present)
        if folder is not None:
            assert read(folder) == self.contents[revision]
            self.present.move_to_end(revision)

    @precondition(lambda self: self.contents)
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        self.get(data)
        revision = next(reversed(self.present), None)
        if revision is not None and revision not in self.corrupt:
            self.runner.run(self.disk.get(revision))
            assert self.disk.acquire(revision)
            self.leases[revision] += 1
            if revision in self.new:
                self.new.remove(revision)
            else:
                self.policy.touch(revision)

    @precondition(lambda self: self.leases.total())
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        revision = data.draw(st.sampled_from(sorted(self.leases.elements())))
        self.disk.release(revision)
        self.leases[revision] -= 1

    @rule(data=st.data())
    def restart(self, data: st.DataObject) -> None:
        """The process ends; meanwhile some folders rot, and others' unfinished downloads lie about."""
        self.runner.run(self.disk.close())
        self.leases.clear()
        self.new.clear()
        self.policy = S3Fifo(QUOTA)
        for revision, size in self.present.items():
            self.policy.add(revision, size)
        for revision in data.draw(st.sets(st.sampled_from(sorted(self.present)))) if self.present else ():
            if revision not in self.corrupt:
                corrupt(self.root / revision.removeprefix("sha256:"))
                self.corrupt.add(revision)
        leftover = self.root / "incoming" / "0123456789abcdef" / "download"
        leftover.mkdir(parents=True)
        (leftover / "adapter_model.safetensors").write_bytes(b"half")
        self.disk = DiskTier(self.root, QUOTA)
        assert not leftover.parent.exists()

    @invariant()
    def tier_holds_what_the_model_holds(self) -> None:
        if not hasattr(self, "disk"):
            return
        self.disk.check_integrity()
        folders = {path.name for path in self.root.iterdir()} - {"arriving", "incoming", "names"}
        assert {f"sha256:{name}" for name in folders} == set(self.present)
        assert len(self.disk) == len(self.present)
        assert self.disk.used_bytes == sum(self.present.values()) <= QUOTA
        assert all(read(self.disk.folder_of(revision)) == self.contents[revision] for revision in +self.leases)
        assert not self.unfinished()


TestDiskTierMachine = DiskTierMachine.TestCase
TestDiskTierMachine.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
