"""The store over folders and plain web servers: what is an adapter, what is none, and what is an outage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from loramux_schemas import ErrorCode
from loramux_worker.adapters.source import StoreChanged
from loramux_worker.adapters.store import MAX_CONFIG_BYTES, AdapterStore
from loramux_worker.adapters.text_files import MAX_TEXT_BYTES
from loramux_worker.errors import ConfigurationError, RequestFailed
from web_server import WebServer, serving

FILES = {"adapter_config.json": b'{"r": 8}', "adapter_model.safetensors": b"weights" * 1000}
TEXT = {
    "tokenizer.json": b"tokenizer",
    "tokenizer_config.json": b"{}",
    "special_tokens_map.json": b"{}",
    "added_tokens.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "generation_config.json": b"{}",
}


def put(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


async def read(store: AdapterStore, adapter_id: str, folder: Path) -> dict[str, bytes]:
    content = {}
    for file in await store.list(adapter_id):
        digest = await store.download(adapter_id, file, folder / file.name)
        content[file.name] = (folder / file.name).read_bytes()
        assert (digest.name, digest.size) == (file.name, len(content[file.name]))
    return content


@pytest.mark.parametrize(
    ("template", "place"),
    [
        ("{adapter_id}", "acme/support"),
        ("models/{adapter_id}", "models/acme/support"),
        ("lora-{adapter_id}/latest/", "lora-acme/support/latest"),
        ("with%20space/{adapter_id}", "with space/acme/support"),
    ],
)
async def test_template_leads_to_the_adapter(tmp_path: Path, template: str, place: str) -> None:
    put(tmp_path / "base" / place, FILES | {"README.md": b"", "optimizer.pt": b"never read"})
    store = AdapterStore(f"file://{tmp_path}/base/{template}")
    assert await read(store, "acme/support", tmp_path) == FILES


@pytest.mark.parametrize("names", [sorted(TEXT), ["chat_template.jinja"], ["generation_config.json", "tokenizer.json"]])
async def test_the_text_that_an_adapter_brings_comes_with_it(tmp_path: Path, names: list[str]) -> None:
    files = FILES | {name: TEXT[name] for name in names}
    others = {"checkpoint-1/tokenizer.json": b"", "additional_chat_templates/tools.jinja": b"", "vocab.json": b""}
    put(tmp_path / "a", files | others)
    assert await read(AdapterStore(f"file://{tmp_path}/{{adapter_id}}"), "a", tmp_path) == files


@pytest.mark.parametrize(
    ("files", "code", "reason"),
    [
        ({"elsewhere/adapter_config.json": b"{}"}, ErrorCode.ADAPTER_NOT_FOUND, "there is no adapter 'a/b'"),
        ({"a/b/deeper/adapter_config.json": b"{}"}, ErrorCode.ADAPTER_NOT_FOUND, "there is no adapter 'a/b'"),
        ({"a/b-other/adapter_config.json": b"{}"}, ErrorCode.ADAPTER_NOT_FOUND, "there is no adapter 'a/b'"),
        ({"a/b": b"a file"}, ErrorCode.ADAPTER_NOT_FOUND, "there is no adapter 'a/b'"),
        ({"a/b/README.md": b""}, ErrorCode.ADAPTER_INVALID, "adapter_config.json is missing"),
        ({"a/b/adapter_config.json": b"{}"}, ErrorCode.ADAPTER_INVALID, "safetensors is missing"),
        ({"a/b/adapter_model.safetensors": b""}, ErrorCode.ADAPTER_INVALID, "adapter_config.json is missing"),
        (
            {"a/b/adapter_config.json": b"{}", "a/b/adapter_model.bin": b"\x80"},
            ErrorCode.ADAPTER_INVALID,
            r"pickle \(adapter_model.bin\)",
        ),
        ({"a/b/adapter.pt": b"\x80"}, ErrorCode.ADAPTER_INVALID, r"pickle \(adapter.pt\)"),
        (
            {
                "a/b/adapter_config.json": b" " * (MAX_CONFIG_BYTES + 1),
                "a/b/adapter_model.safetensors": b"",
            },
            ErrorCode.ADAPTER_INVALID,
            "adapter_config.json has 4194305 bytes",
        ),
        (
            {f"a/b/{name}": content for name, content in FILES.items()}
            | {"a/b/chat_template.jinja": b" " * (MAX_TEXT_BYTES["chat_template.jinja"] + 1)},
            ErrorCode.ADAPTER_INVALID,
            "chat_template.jinja has 4194305 bytes, over 4194304",
        ),
    ],
)
async def test_what_is_no_adapter(tmp_path: Path, files: dict[str, bytes], code: ErrorCode, reason: str) -> None:
    put(tmp_path, files)
    with pytest.raises(RequestFailed, match=reason) as failure:
        await AdapterStore(f"file://{tmp_path}/{{adapter_id}}").list("a/b")
    assert failure.value.code == code


async def test_name_too_long_for_a_file_system_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestFailed) as failure:
        await AdapterStore(f"file://{tmp_path}/{{adapter_id}}").list("a" * 256)
    assert failure.value.code == ErrorCode.ADAPTER_NOT_FOUND


async def test_file_that_is_not_what_was_listed(tmp_path: Path) -> None:
    put(tmp_path / "a", FILES)
    store = AdapterStore(f"file://{tmp_path}/{{adapter_id}}")
    config, weights = await store.list("a")
    put(tmp_path / "a", {"adapter_config.json": b'{"r": 9}'})
    (tmp_path / "a" / "adapter_model.safetensors").unlink()
    for file in (config, weights):
        with pytest.raises(StoreChanged):
            await store.download("a", file, tmp_path / "download")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("s3://bucket/adapters", "has no {adapter_id}"),
        ("/models/{adapter_id}", "begins with none of file://, s3://"),
        ("ftp://host/{adapter_id}", "begins with none of file://, s3://"),
        ("s3://{adapter_id}", "needs a bucket"),
        ("s3:///{adapter_id}", "needs a bucket"),
        ("s3://bucket/{tenant}/{adapter_id}", "no braces"),
        ("https://host/{adapter_id}?token=1", "no '\\?'"),
        ("s3://bucket/{adapter_id}/../secret", "no '.' or '..'"),
        ("file://adapters/{adapter_id}", "three slashes"),
        ("file:///no/such/folder/{adapter_id}", "there is no folder /no/such/folder"),
        ("az://container/{adapter_id}", "Account must be specified"),
    ],
)
def test_template_that_leads_nowhere_names_the_setting(
    template: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_NAME", raising=False)
    with pytest.raises(ConfigurationError, match=rf"^--adapter-uri .*{reason}") as failure:
        AdapterStore(template)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize(
    "template",
    [
        "file:///{adapter_id}",
        "s3://bucket/adapters/{adapter_id}",
        "gs://bucket/adapters/{adapter_id}",
        "az://container/adapters/{adapter_id}",
        "http://127.0.0.1:1/{adapter_id}",
        "https://example.com/adapters/{adapter_id}",
        "hf://org/{adapter_id}",
    ],
)
def test_every_scheme_opens(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "account")
    assert AdapterStore(template).uri("acme/a") == template.replace("{adapter_id}", "acme/a")


@pytest.fixture
def web() -> Iterator[WebServer]:
    with serving(WebServer()) as server:
        yield server


def web_store(web: WebServer, timeout: float = 30.0) -> AdapterStore:
    return AdapterStore(f"{web.url}/adapters/{{adapter_id}}", timeout=timeout)


async def test_plain_web_server(web: WebServer, tmp_path: Path) -> None:
    web.files = {f"/adapters/acme/support/{name}": content for name, content in FILES.items()}
    web.files["/adapters/half/adapter_config.json"] = b"{}"
    assert await read(web_store(web), "acme/support", tmp_path) == FILES
    for adapter_id, code in (("other", ErrorCode.ADAPTER_NOT_FOUND), ("half", ErrorCode.ADAPTER_INVALID)):
        with pytest.raises(RequestFailed) as failure:
            await web_store(web).list(adapter_id)
        assert failure.value.code == code
    assert {request.split()[0] for request in web.requests} == {"GET", "HEAD"}
    assert web.requests["HEAD /adapters/half/tokenizer.json"] == 0, "what is no adapter is not asked for text"
    web.files |= {f"/adapters/acme/support/{name}": content for name, content in TEXT.items()}
    assert await read(web_store(web), "acme/support", tmp_path) == FILES | TEXT


async def test_server_errors_are_tried_again(web: WebServer, tmp_path: Path) -> None:
    web.files = {f"/adapters/a/{name}": content for name, content in FILES.items()}
    web.failures = 3
    assert await read(web_store(web), "a", tmp_path) == FILES


async def test_server_errors_are_not_tried_for_ever(web: WebServer) -> None:
    web.failures = 10**6
    with pytest.raises(RequestFailed, match="does not answer") as failure:
        await web_store(web, timeout=0.5).list("a")
    assert failure.value.code == ErrorCode.ADAPTER_UNAVAILABLE
    assert 2 < web.requests.total() < 50


async def test_denied_access_is_unavailable(web: WebServer) -> None:
    web.denied = {"/adapters/a/adapter_config.json"}
    with pytest.raises(RequestFailed, match="denies access") as failure:
        await web_store(web).list("a")
    assert failure.value.code == ErrorCode.ADAPTER_UNAVAILABLE


async def test_connection_that_ends_half_way_is_taken_up_again(web: WebServer, tmp_path: Path) -> None:
    web.files = {f"/adapters/a/{name}": content for name, content in FILES.items()}
    web.broken = {"/adapters/a/adapter_model.safetensors"}
    assert await read(web_store(web), "a", tmp_path) == FILES


async def test_half_a_file_is_never_taken_for_a_whole_one(web: WebServer, tmp_path: Path) -> None:
    web.files = {f"/adapters/a/{name}": content for name, content in FILES.items()}
    web.broken = {"/adapters/a/adapter_model.safetensors"}
    web.ranges = False
    with pytest.raises(RequestFailed, match="does not answer") as failure:
        await read(web_store(web), "a", tmp_path)
    assert failure.value.code == ErrorCode.ADAPTER_UNAVAILABLE


@pytest.mark.parametrize(
    ("template", "place", "listing", "environment"),
    [
        (
            "gs://bucket/{adapter_id}",
            "/bucket",
            b"<ListBucketResult></ListBucketResult>",
            {"GOOGLE_BASE_URL": "URL", "GOOGLE_SKIP_SIGNATURE": "true"},
        ),
        (
            "az://container/{adapter_id}",
            "/container",
            b"<EnumerationResults><Blobs></Blobs></EnumerationResults>",
            {
                "AZURE_STORAGE_ACCOUNT_NAME": "account",
                "AZURE_STORAGE_ENDPOINT": "URL",
                "AZURE_SKIP_SIGNATURE": "true",
            },
        ),
    ],
)
async def test_clouds_are_read_where_the_environment_says(
    web: WebServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    template: str,
    place: str,
    listing: bytes,
    environment: dict[str, str],
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value.replace("URL", web.url))
    web.files = {f"{place}/acme/support/{name}": content for name, content in FILES.items()}
    web.files[place] = listing
    assert await read(AdapterStore(template), "acme/support", tmp_path) == FILES
