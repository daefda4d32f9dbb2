"""The catalog's revisions: new ones, pinned ones, deleted ones, and those a store in an outage cannot name."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from adapter_rig import CONFIG, SECONDS, TTL, FakeStore, Gate, Rig, outage, reached, weights
from loramux_schemas import ErrorCode
from loramux_worker.adapters.revisions import FileDigest
from loramux_worker.adapters.source import StoredFile


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path / "cache")
    rig.store.weights = {"acme/support": b"support", "acme/sales": b"sales"}
    yield rig
    await rig.catalog.close()


async def test_new_revision_is_seen_after_the_ttl_and_not_downloaded_without_need(rig: Rig) -> None:
    first = await rig.fetch("acme/support")
    rig.clock.now = TTL - 1
    rig.store.weights["acme/support"] = b"second"
    assert await rig.fetch("acme/support") == first
    assert rig.store.downloads["acme/support"] == 1

    rig.clock.now = TTL
    second = await rig.fetch("acme/support")
    assert weights(second) == b"second"
    assert weights(first) == b"support", "what runs on the first revision still has its files"

    rig.clock.now = 2 * TTL
    assert await rig.fetch("acme/support") == second
    rig.store.weights["acme/support"] = b"support"
    rig.clock.now = 3 * TTL
    assert await rig.fetch("acme/support") == first, "rolled back"
    assert rig.store.downloads["acme/support"] == 2


async def test_change_during_a_download_is_noticed(rig: Rig) -> None:
    def change(adapter_id: str) -> None:
        rig.store.weights[adapter_id] = b"second" if rig.store.downloads[adapter_id] == 1 else b"third"

    rig.store.on_download = change
    assert weights(await rig.fetch("acme/support")) == b"third"
    assert rig.store.downloads["acme/support"] == 3

    rig.store.on_download = lambda _: rig.store.weights.update({"acme/sales": rig.store.weights["acme/sales"] + b"!"})
    assert (await rig.refusal("acme/sales")).code == ErrorCode.ADAPTER_UNAVAILABLE


async def test_config_that_changes_after_it_was_read_is_noticed(rig: Rig) -> None:
    """The files are one revision only if they are all as listed once the last of them is here."""
    changed: list[str] = []

    async def download(adapter_id: str, file: StoredFile, destination: Path) -> FileDigest:
        digest = await FakeStore.download(rig.store, adapter_id, file, destination)
        if not changed and file.name == "adapter_model.safetensors":
            changed.append(adapter_id)
            rig.store.weights[adapter_id] = b"second"
        return digest

    rig.store.download = download  # type: ignore[method-assign]
    assert weights(await rig.fetch("acme/support")) == b"second"
    assert len(rig.disk) == 1


async def test_pinned_revision(rig: Rig) -> None:
    first = await rig.fetch("acme/support")
    rig.store.weights["acme/support"] = b"second"
    rig.clock.now = TTL
    second = await rig.fetch("acme/support")

    rig.store.failure = outage()
    assert await rig.fetch(f"acme/support@{first.revision}") == first
    assert await rig.fetch(f"acme/support@{second.revision}") == second
    rig.store.failure = None

    refusal = await rig.refusal(f"acme/support@sha256:{'0' * 64}")
    assert refusal.code == ErrorCode.ADAPTER_NOT_FOUND
    assert (await rig.refusal("acme/support@main")).code == ErrorCode.ADAPTER_NOT_FOUND
    listings = rig.store.listings["acme/support"]
    await asyncio.gather(*(rig.refusal(f"acme/support@v{i}") for i in range(50)))
    assert rig.store.listings["acme/support"] == listings, "a flood of wrong pins does not reach the store"


async def test_pinned_revision_that_only_the_store_has(rig: Rig) -> None:
    revision = (await rig.fetch("acme/support")).revision
    (other := Rig(rig.root.with_name("other"), store=rig.store)).clock.now = 100.0
    reference = await other.fetch(f"acme/support@{revision}")
    assert reference.revision == revision
    assert Path(reference.path).is_relative_to(other.root)
    await other.catalog.close()


async def test_pin_does_not_lead_to_the_files_of_another_adapter(rig: Rig) -> None:
    secret = await rig.fetch("acme/support")
    assert (await rig.refusal(f"acme/sales@{secret.revision}")).code == ErrorCode.ADAPTER_NOT_FOUND


async def test_restart_downloads_nothing_again_and_survives_an_outage(rig: Rig) -> None:
    first = await rig.fetch("acme/support")
    await rig.restart()
    assert await rig.fetch("acme/support") == first
    assert rig.store.downloads["acme/support"] == 1

    rig.store.failure = outage()
    await rig.restart()
    assert await rig.fetch("acme/support") == first
    assert await rig.fetch(f"acme/support@{first.revision}") == first


async def test_corrupt_folder_is_fetched_again_after_a_restart(rig: Rig) -> None:
    first = await rig.fetch("acme/support")
    await rig.catalog.close()
    (Path(first.path) / "adapter_model.safetensors").write_bytes(b"rotten!")
    rig.open()
    assert await rig.fetch("acme/support") == first
    assert weights(first) == b"support"
    assert rig.store.downloads["acme/support"] == 2


async def test_outage_harms_only_what_is_nowhere_else(rig: Rig) -> None:
    first = await rig.fetch("acme/support")
    rig.clock.now = TTL
    rig.store.failure = outage()
    assert await rig.fetch("acme/support") == first
    listings = rig.store.listings["acme/support"]
    assert await rig.fetch("acme/support") == first
    assert rig.store.listings["acme/support"] == listings, "nobody waits for a store that has just failed"
    assert (await rig.refusal("acme/sales")).code == ErrorCode.ADAPTER_UNAVAILABLE

    rig.store.failure = None
    rig.store.weights["acme/support"] = b"second"
    assert weights(await rig.fetch("acme/sales")) == b"sales"
    rig.clock.now += 5.0
    assert weights(await rig.fetch("acme/support")) == b"second"


async def test_store_that_hangs_is_not_waited_for_when_a_revision_is_on_disk(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "cache", patience=0.01)
    rig.store.weights["acme/support"] = b"first"
    first = await rig.fetch("acme/support")
    rig.clock.now = TTL
    rig.store.weights["acme/support"] = b"second"
    gate = rig.store.gates["acme/support"] = Gate()
    assert await rig.fetch("acme/support") == first, "the second revision is still on its way"
    await reached(gate)
    assert await rig.fetch("acme/support") == first
    gate.open.set()
    async with asyncio.timeout(SECONDS):
        while weights(await rig.fetch("acme/support")) != b"second":
            rig.clock.now += 5.0
    assert rig.store.downloads["acme/support"] == 2
    await rig.catalog.close()


async def test_revision_on_disk_stays_while_a_request_waits_for_the_store(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "cache", quota=2 * len(CONFIG) + 200)
    rig.store.weights = {name: name.encode() * 90 for name in "abc"}
    first = await rig.fetch("a")
    rig.clock.now = TTL
    gate = rig.store.list_gates["a"] = Gate()
    waiting = rig.start("a")
    await reached(gate)
    await rig.fetch("b")
    await rig.fetch("c")
    rig.store.failure = outage()
    gate.open.set()
    assert await waiting == first
    assert weights(first) == b"a" * 90
    await rig.catalog.close()


async def test_deleted_adapter_is_not_served_from_disk(rig: Rig) -> None:
    first = await rig.fetch("acme/support")
    del rig.store.weights["acme/support"]
    rig.clock.now = TTL
    assert (await rig.refusal("acme/support")).code == ErrorCode.ADAPTER_NOT_FOUND
    assert (await rig.refusal(f"acme/support@{first.revision}")).code == ErrorCode.ADAPTER_NOT_FOUND
    await rig.restart()
    rig.store.failure = outage()
    assert (await rig.refusal("acme/support")).code == ErrorCode.ADAPTER_UNAVAILABLE
