"""Adapters from a hub on loopback, asked through huggingface_hub: repositories, revisions, tokens, refusals."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from loramux_schemas import ErrorCode
from loramux_worker.adapters import hub_source
from loramux_worker.adapters.hub_source import split_hub_template
from loramux_worker.adapters.source import StoreChanged
from loramux_worker.adapters.store import AdapterStore
from loramux_worker.errors import ConfigurationError, RequestFailed
from web_server import HubServer, WebServer, serving

FILES = {"adapter_config.json": b'{"r": 8}', "adapter_model.safetensors": b"weights" * 1000, "README.md": b"read me"}
ADAPTER = {name: FILES[name] for name in ("adapter_config.json", "adapter_model.safetensors")}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with serving(WebServer()) as storage, serving(HubServer(storage)) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_TOKEN", "")
        monkeypatch.setenv("HF_HUB_DISABLE_IMPLICIT_TOKEN", "0")
        hub.commit("acme/support", FILES)
        yield hub


async def read(template: str, adapter_id: str, folder: Path, timeout: float = 30.0) -> dict[str, bytes]:
    store = AdapterStore(template, timeout=timeout)
    content = {}
    for file in await store.list(adapter_id):
        await store.download(adapter_id, file, folder / file.name)
        content[file.name] = (folder / file.name).read_bytes()
    return content


async def refusal(template: str, adapter_id: str, timeout: float = 30.0) -> RequestFailed:
    with pytest.raises(RequestFailed) as failure:
        await AdapterStore(template, timeout=timeout).list(adapter_id)
    return failure.value


@pytest.mark.parametrize(
    ("template", "adapter_id"),
    [
        ("hf://{adapter_id}", "acme/support"),
        ("hf://acme/{adapter_id}", "support"),
        ("hf://acme/{adapter_id}/", "support"),
        ("hf://acme/{adapter_id}@main", "support"),
    ],
)
async def test_template_leads_to_the_repository(hub: HubServer, tmp_path: Path, template: str, adapter_id: str) -> None:
    assert await read(template, adapter_id, tmp_path) == ADAPTER


async def test_one_repository_holds_many_adapters(hub: HubServer, tmp_path: Path) -> None:
    files = {f"adapters/{name}/{file}": name.encode() for name in ("a", "b/c") for file in ADAPTER}
    hub.commit("acme/all", files, "refs/pr/1")
    for name in ("a", "b/c"):
        content = await read("hf://acme/all@refs%2Fpr%2F1/adapters/{adapter_id}", name, tmp_path)
        assert content == dict.fromkeys(ADAPTER, name.encode())


async def test_revision_is_a_branch_a_tag_or_a_commit(hub: HubServer, tmp_path: Path) -> None:
    first = hub.branches["acme/support", "main"]
    hub.branches["acme/support", "v1"] = first
    hub.commit("acme/support", FILES | {"adapter_config.json": b"second"})
    for revision, config in (("v1", FILES["adapter_config.json"]), (first, FILES["adapter_config.json"])):
        content = await read(f"hf://acme/{{adapter_id}}@{revision}", "support", tmp_path)
        assert content["adapter_config.json"] == config
    assert (await read("hf://acme/{adapter_id}", "support", tmp_path))["adapter_config.json"] == b"second"


async def test_what_was_listed_is_read_even_when_the_branch_moves_on(hub: HubServer, tmp_path: Path) -> None:
    store = AdapterStore("hf://{adapter_id}")
    files = await store.list("acme/support")
    hub.commit("acme/support", dict.fromkeys(FILES, b"changed"))
    for file in files:
        await store.download("acme/support", file, tmp_path / file.name)
        assert (tmp_path / file.name).read_bytes() == FILES[file.name]
    assert await store.list("acme/support") != files


async def test_commit_that_leaves_the_adapter_alone_changes_nothing(hub: HubServer) -> None:
    store = AdapterStore("hf://{adapter_id}")
    files = await store.list("acme/support")
    hub.commit("acme/support", FILES | {"README.md": b"another"})
    assert await store.list("acme/support") == files


async def test_token_goes_to_the_hub_and_nowhere_else(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.private = {"acme/support"}
    missing = await refusal("hf://{adapter_id}", "acme/support")
    assert missing.code == ErrorCode.ADAPTER_NOT_FOUND
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert await read("hf://{adapter_id}", "acme/support", tmp_path) == ADAPTER
    assert hub.storage.requests.total() > 0
    assert not [headers for headers in hub.storage.headers if "authorization" in headers]


async def test_what_is_no_adapter(hub: HubServer) -> None:
    hub.commit("acme/pickled", {"adapter_config.json": b"{}", "adapter_model.bin": b"\x80"})
    hub.gated = {"acme/gated"}
    for adapter_id in ("acme/nothing", "nothing", "acme/support/deeper", "acme/bad--name", "acme/repo.git"):
        assert (await refusal("hf://{adapter_id}", adapter_id)).code == ErrorCode.ADAPTER_NOT_FOUND
    assert (await refusal("hf://{adapter_id}@v9", "acme/support")).code == ErrorCode.ADAPTER_NOT_FOUND
    pickled = await refusal("hf://{adapter_id}", "acme/pickled")
    assert (pickled.code, "pickle (adapter_model.bin)" in pickled.message) == (ErrorCode.ADAPTER_INVALID, True)
    gated = await refusal("hf://{adapter_id}", "acme/gated")
    assert gated.code == ErrorCode.ADAPTER_UNAVAILABLE
    assert "denies access" in gated.message


@pytest.mark.parametrize("status", [429, 503])
async def test_hub_that_is_busy_is_asked_again(hub: HubServer, tmp_path: Path, status: int) -> None:
    hub.failures, hub.failure_status = 3, status
    assert await read("hf://{adapter_id}", "acme/support", tmp_path) == ADAPTER


async def test_hub_that_does_not_answer_is_unavailable_in_time(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.failures = 10**6
    monkeypatch.setattr(hub_source, "IDLE_TIMEOUT", 0.2)
    async with asyncio.timeout(10):
        down = await refusal("hf://{adapter_id}", "acme/support", timeout=0.5)
        assert down.code == ErrorCode.ADAPTER_UNAVAILABLE
        hub.server_close()  # and now nobody listens
        hub.shutdown()
        assert (await refusal("hf://{adapter_id}", "acme/support", timeout=0.5)).code == ErrorCode.ADAPTER_UNAVAILABLE


async def test_storage_that_holds_other_bytes_is_found_out(hub: HubServer, tmp_path: Path) -> None:
    content = FILES["adapter_model.safetensors"]
    hub.stored[hashlib.sha256(content).hexdigest()] = content[:-1] + b"?"
    with pytest.raises(StoreChanged, match="digest"):
        await read("hf://{adapter_id}", "acme/support", tmp_path)


@pytest.mark.parametrize(
    ("template", "parts"),
    [
        ("hf://{adapter_id}", ("{adapter_id}", None)),
        ("hf://org/{adapter_id}@v1.0", ("org/{adapter_id}", "v1.0")),
        ("hf://{adapter_id}@main/", ("{adapter_id}", "main")),
        ("hf://org/name@refs%2Fpr%2F3/x/{adapter_id}", ("org/name/x/{adapter_id}", "refs/pr/3")),
    ],
)
def test_revision_is_told_from_the_place(template: str, parts: tuple[str, str | None]) -> None:
    assert split_hub_template(template) == parts


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("hf://org/name", "has no {adapter_id}"),
        ("hf://org/{adapter_id}@a@b", "one '@'"),
        ("hf://org/{adapter_id}@", "after '@'"),
        ("hf://org/name@{adapter_id}", "after '@'"),
        ("hf://org@main/{adapter_id}", "org/name before '@'"),
        ("hf://org/../{adapter_id}", "no '.' and no '..'"),
        ("hf://org//{adapter_id}", "no empty part"),
        ("hf://org/{adapter_id}?x=1", "no '\\?'"),
    ],
)
def test_template_that_leads_nowhere_names_the_setting(template: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^--adapter-uri .*{reason}"):
        AdapterStore(template)
