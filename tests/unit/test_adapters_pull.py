"""`loramux adapters pull`: what it fetches, a worker that starts later finds."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest

from adapter_folders import make_adapter
from adapters_cli import SilentServer, interrupted_when, run
from loramux_schemas import AdapterName
from loramux_worker.adapters.catalog import AdapterCatalog
from loramux_worker.adapters.disk import DiskTier
from loramux_worker.adapters.revisions import digest_folder, revision_of
from loramux_worker.adapters.store import AdapterStore

IDS = ("acme/pirate", "acme/spanish", "plain")


@pytest.fixture
def store(tmp_path: Path) -> Path:
    for seed, adapter_id in enumerate(IDS):
        make_adapter(tmp_path / "store", adapter_id, seed=seed)
    return tmp_path / "store"


@pytest.fixture
def uri(store: Path) -> str:
    return f"file://{store}/{{adapter_id}}"


def revision(store: Path, adapter_id: str) -> str:
    return revision_of(digest_folder(store / adapter_id))


def downloads_of_a_worker(uri: str, cache: Path) -> int:
    """How many adapters a worker with this cache has to download for a request to each."""

    async def serve() -> int:
        disk = DiskTier(cache, 1 << 30)
        catalog = AdapterCatalog(AdapterStore(uri), disk, revision_ttl=60, adapter_timeout=30)
        for adapter_id in IDS:
            reference = await catalog.acquire(AdapterName(adapter_id))
            assert Path(reference.path).parent == cache
        disk.check_integrity()
        await catalog.close()
        return catalog.stats.downloads

    return asyncio.run(serve())


def test_a_worker_finds_them(store: Path, uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    outcome = run(capsys, "pull", *IDS, IDS[0], "--adapter-uri", uri, "--disk-cache", cache)
    assert outcome.code == 0
    assert outcome.out.splitlines() == [f"{adapter_id}  {revision(store, adapter_id)}" for adapter_id in IDS]
    assert outcome.err == ""
    assert list((cache / "incoming").iterdir()) == []
    assert downloads_of_a_worker(uri, cache) == 0


def test_a_second_pull_takes_only_what_is_new(
    store: Path, uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    old = revision(store, IDS[0])
    run(capsys, "pull", *IDS, "--adapter-uri", uri, "--disk-cache", cache)
    shutil.rmtree(store / IDS[0])
    make_adapter(store, IDS[0], seed=9)
    outcome = run(capsys, "pull", *IDS, "--adapter-uri", uri, "--disk-cache", cache)
    assert outcome.out.splitlines()[0] == f"{IDS[0]}  {revision(store, IDS[0])}"
    assert old not in outcome.out
    assert len([path for path in cache.iterdir() if len(path.name) == 64]) == len(IDS) + 1
    assert downloads_of_a_worker(uri, cache) == 0


def test_settings_come_from_where_the_worker_takes_them(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "loramux.toml"
    file.write_text(f'model = "m"\ndisk_cache = "{tmp_path}/cache"\n')
    monkeypatch.setenv("LORAMUX_ADAPTER_URI", uri)
    assert run(capsys, "pull", *IDS, "--config", file).code == 0
    assert downloads_of_a_worker(uri, tmp_path / "cache") == 0


def test_what_cannot_be_had_is_told_beside_the_others(
    store: Path, uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (store / "plain" / "adapter_config.json").unlink()
    names = ("no/such", IDS[0], "plain", f"{IDS[1]}@v1")
    outcome = run(capsys, "pull", *names, "--adapter-uri", uri, "--disk-cache", tmp_path / "cache")
    assert outcome.code == 1
    assert outcome.out == f"{IDS[0]}  {revision(store, IDS[0])}\n"
    missing, half, pinned = outcome.err.splitlines()
    assert missing == "loramux: no/such: there is no adapter 'no/such' in the store (adapter_not_found)"
    assert "adapter_config.json is missing (adapter_invalid)" in half
    assert f"the store holds {revision(store, IDS[1])} now, not v1" in pinned


def test_a_quota_that_is_too_small_for_all(
    store: Path, uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = sum(file.stat().st_size for file in (store / IDS[0]).iterdir())
    quota = ("--disk-quota", size * 2)
    outcome = run(capsys, "pull", *IDS, "--adapter-uri", uri, "--disk-cache", tmp_path / "cache", *quota)
    assert outcome.code == 1
    assert len(outcome.out.splitlines()) == 2
    assert outcome.err.count("evicted again: --disk-quota is too small for all of them") == 1


def test_wrong_options_are_one_line(uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "pull", "a").assert_refused("--adapter-uri is required (or LORAMUX_ADAPTER_URI)")
    run(capsys, "pull", "../a", "--adapter-uri", uri).assert_refused("'../a' is not an adapter id")
    run(capsys, "pull", "a", "--adapter-uri", uri, "--disk-quota", "plenty").assert_refused("--disk-quota")
    (tmp_path / "file").touch()
    run(capsys, "pull", "a", "--adapter-uri", uri, "--disk-cache", tmp_path / "file").assert_refused("--disk-cache")


def test_ctrl_c_leaves_nothing_unfinished(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cache = tmp_path / "cache"
    with SilentServer() as server, interrupted_when(server.reached.is_set):
        outcome = run(capsys, "pull", "a", "b", "--adapter-uri", f"{server.url}/{{adapter_id}}", "--disk-cache", cache)
    assert (outcome.code, outcome.out) == (130, "")
    assert "Traceback" not in outcome.err
    assert list((cache / "incoming").iterdir()) == []
