"""The catalog: one download for many requests, none in another's way, every failure the right code."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from adapter_rig import CONFIG, SECONDS, TTL, Gate, Rig, reached, until_blocked, weights
from loramux_schemas import AdapterName, ErrorCode
from loramux_worker.adapters.catalog import AdapterCatalog
from loramux_worker.adapters.disk import DiskTier
from loramux_worker.adapters.store import AdapterStore
from loramux_worker.errors import ConfigurationError, RequestFailed


@pytest.fixture
async def rig(tmp_path: Path) -> AsyncIterator[Rig]:
    rig = Rig(tmp_path / "cache")
    rig.store.weights = {"acme/support": b"support", "acme/sales": b"sales"}
    yield rig
    await rig.catalog.close()


async def test_adapter_of_a_folder_arrives_on_disk_under_its_digest(tmp_path: Path) -> None:
    place = tmp_path / "adapters" / "acme" / "support"
    place.mkdir(parents=True)
    (place / "adapter_config.json").write_bytes(CONFIG)
    (place / "adapter_model.safetensors").write_bytes(b"weights")
    (place / "README.md").write_text("not needed")
    store = AdapterStore(f"file://{tmp_path}/adapters/{{adapter_id}}")
    catalog = AdapterCatalog(store, DiskTier(tmp_path / "cache", 1000), revision_ttl=TTL, adapter_timeout=SECONDS)

    reference = await catalog.fetch(AdapterName("acme/support"))
    assert reference.adapter_id == "acme/support"
    assert Path(reference.path) == tmp_path / "cache" / reference.revision.removeprefix("sha256:")
    assert {path.name: path.read_bytes() for path in Path(reference.path).iterdir()} == {
        "adapter_config.json": CONFIG,
        "adapter_model.safetensors": b"weights",
    }
    assert catalog.stats.downloads == 1
    await catalog.close()


async def test_many_requests_share_one_download(rig: Rig) -> None:
    gate = rig.store.gates["acme/support"] = Gate()
    waiting = [rig.start("acme/support") for _ in range(100)]
    await reached(gate)
    gate.open.set()
    references = await asyncio.gather(*waiting)
    assert len(set(references)) == 1
    assert rig.store.downloads["acme/support"] == 1
    assert rig.catalog.stats.lookups == {("disk", "miss"): 100, ("store", "hit"): 1}
    assert len(rig.loads) == 1
    assert (await rig.fetch("acme/support")) == references[0]
    assert rig.catalog.stats.lookups["disk", "hit"] == 1
    assert rig.catalog.stats.downloaded_bytes == len(CONFIG) + len(b"support")


async def test_cancelled_request_leaves_the_download_to_the_others(rig: Rig) -> None:
    gate = rig.store.gates["acme/support"] = Gate()
    first, second = rig.start("acme/support"), rig.start("acme/support")
    await reached(gate)
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    gate.open.set()
    assert weights(await second) == b"support"
    assert rig.store.downloads["acme/support"] == 1


async def test_slow_download_delays_nobody_else(rig: Rig) -> None:
    gate = rig.store.gates["acme/support"] = Gate()
    slow = rig.start("acme/support")
    await reached(gate)
    rig.store.weights |= {f"adapter-{i}": b"%d" % i for i in range(50)}
    others = await asyncio.gather(*(rig.fetch(f"adapter-{i}") for i in range(50)))
    assert [weights(reference) for reference in others] == [b"%d" % i for i in range(50)]
    assert not slow.done()
    gate.open.set()
    assert weights(await slow) == b"support"


async def test_downloads_are_parallel_and_bounded(rig: Rig) -> None:
    gate = Gate()
    rig.store.weights = {f"adapter-{i}": b"%d" % i for i in range(20)}
    rig.store.gates = dict.fromkeys(rig.store.weights, gate)
    eight_run = asyncio.Event()
    rig.store.on_download = lambda adapter_id: eight_run.set() if rig.store.running == 8 else None
    fetches = [rig.start(adapter_id) for adapter_id in rig.store.weights]
    async with asyncio.timeout(SECONDS):
        await eight_run.wait()
    gate.open.set()
    await asyncio.gather(*fetches)
    assert rig.store.most_running == 8


async def test_adapter_that_does_not_arrive_in_time_is_unavailable(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "cache", timeout=0.05)
    rig.store.weights = {"slow": b"slow", "hung": b"hung", "fast": b"fast"}
    rig.store.gates["slow"] = rig.store.list_gates["hung"] = Gate()
    for name in ("slow", "hung"):
        refusal = await rig.refusal(name)
        assert refusal.code == ErrorCode.ADAPTER_UNAVAILABLE
        assert refusal.message == f"adapter '{name}' did not arrive within 0.05 s"
    rig.store.gates.clear()
    assert rig.store.running == 0, "the slot is free again"
    assert weights(await rig.fetch("slow")) == b"slow"
    await rig.catalog.close()


async def test_floods_of_names_that_lead_nowhere_spare_the_store(rig: Rig) -> None:
    refusals = await asyncio.gather(*(rig.refusal("acme/nothing") for _ in range(100)))
    assert {refusal.code for refusal in refusals} == {ErrorCode.ADAPTER_NOT_FOUND}
    await rig.refusal("acme/nothing")
    await rig.refusal(f"acme/nothing@sha256:{'0' * 64}")
    assert rig.store.listings["acme/nothing"] == 1
    rig.store.weights["acme/nothing"] = b"now there"
    rig.clock.now = 3.0
    assert weights(await rig.fetch("acme/nothing")) == b"now there"


async def test_lease_keeps_the_folder_while_others_need_room(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "cache", quota=2 * len(CONFIG) + 200)
    rig.store.weights = {name: name.encode() * 90 for name in "abc"}
    with rig.catalog.lease(await rig.fetch("a")) as leased:
        await rig.fetch("b")
        await rig.fetch("c")
        assert weights(leased) == b"a" * 90
    assert rig.disk.evictions == 1
    await rig.fetch("b")
    with pytest.raises(RequestFailed, match="left the disk cache"), rig.catalog.lease(leased):
        pass

    acquired = await rig.catalog.acquire(AdapterName("a"))
    blocked = await rig.catalog.acquire(AdapterName("b"))
    waiting = rig.start("c")
    await until_blocked()
    assert not waiting.done()
    rig.catalog.release(blocked)
    assert weights(await waiting) == b"c" * 90
    assert weights(acquired) == b"a" * 90
    rig.catalog.release(acquired)
    rig.disk.check_integrity()
    await rig.catalog.close()


async def test_adapter_larger_than_the_quota_is_invalid(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "cache", quota=50)
    rig.store.weights = {"large": b"x" * 50, "small": b"x"}
    refusal = await rig.refusal("large")
    assert refusal.code == ErrorCode.ADAPTER_INVALID
    assert "more than the 50 of --disk-quota" in refusal.message
    assert weights(await rig.fetch("small")) == b"x"
    await rig.catalog.close()


async def test_cache_that_breaks_while_running_is_unavailable(rig: Rig) -> None:
    (workspace,) = (rig.root / "incoming").iterdir()
    workspace.rmdir()
    workspace.write_text("a file where the folder was")
    refusal = await rig.refusal("acme/support")
    assert refusal.code == ErrorCode.ADAPTER_UNAVAILABLE
    assert "cache" in refusal.message


async def test_without_a_store_there_are_no_adapters(tmp_path: Path) -> None:
    catalog = AdapterCatalog(None, DiskTier(tmp_path, 100), revision_ttl=TTL, adapter_timeout=SECONDS)
    with pytest.raises(RequestFailed, match="no --adapter-uri") as failure:
        await catalog.fetch(AdapterName("acme/support"))
    assert failure.value.code == ErrorCode.ADAPTER_NOT_FOUND
    with pytest.raises(ConfigurationError, match=r"--adapters acme/support: .*no --adapter-uri"):
        await catalog.preload(["acme/support"])
    await catalog.close()


async def test_preload_brings_all_or_names_what_is_wrong(rig: Rig) -> None:
    references = await rig.catalog.preload(["acme/support", "acme/sales"])
    assert [reference.adapter_id for reference in references] == ["acme/support", "acme/sales"]
    with pytest.raises(ConfigurationError, match="--adapters acme/nothing: there is no adapter"):
        await rig.catalog.preload(["acme/support", "acme/nothing"])
    with pytest.raises(ConfigurationError, match=r"--adapters ../etc: "):
        await rig.catalog.preload(["../etc"])


async def test_closing_answers_those_who_wait(rig: Rig) -> None:
    gate = rig.store.gates["acme/support"] = Gate()
    waiting = rig.start("acme/support")
    await reached(gate)
    await rig.catalog.close()
    with pytest.raises(RequestFailed, match="stopping") as failure:
        await waiting
    assert failure.value.code == ErrorCode.ADAPTER_UNAVAILABLE
    assert not list((rig.root / "incoming").iterdir())
