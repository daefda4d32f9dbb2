"""`loramux adapters` on a real S3 server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adapters_cli import run
from services.s3 import S3Server
from tiny_models import TinyModel, make_model

pytestmark = pytest.mark.s3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    return make_model(tmp_path_factory.mktemp("commands"), "llama", num_adapters=2)


@pytest.fixture
def uri(tiny: TinyModel, s3: S3Server, s3_bucket: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The template of a bucket with the model's adapters in it, in the environment of its credentials."""
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    bucket = s3.store(s3_bucket)
    for path in tiny.adapters.rglob("*"):
        if path.is_file():
            bucket.put(f"lora/{path.relative_to(tiny.adapters)}", path.read_bytes())
    return f"s3://{s3_bucket}/lora/{{adapter_id}}"


def test_list_check_pull_and_merge(
    tiny: TinyModel, uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    listed = run(capsys, "list", uri, "--json")
    ids = [json.loads(line)["adapter"] for line in listed.out.splitlines()]
    assert ids == list(tiny.adapter_ids)  # S3 lists by name

    common = ("--adapter-uri", uri)
    checked = run(capsys, "check", *ids, "--model", tiny.path, *common, "--json")
    assert checked.code == 0
    revisions = [report["revision"] for report in json.loads(checked.out)["adapters"]]

    pulled = run(capsys, "pull", *ids, *common, "--disk-cache", tmp_path / "cache")
    assert pulled.code == 0
    lines = [f"{adapter_id}  {revision}" for adapter_id, revision in zip(ids, revisions, strict=True)]
    assert pulled.out.splitlines() == lines
    for revision in revisions:
        assert (tmp_path / "cache" / revision.removeprefix("sha256:") / "adapter_model.safetensors").is_file()

    merged = run(capsys, "merge", ids[1], "--model", tiny.path, "--out", tmp_path / "out", *common)
    assert (merged.code, merged.err) == (0, "")
    prompt = [65, 66, 67, 68]
    wanted = tiny.reference().generate(prompt, ids[1], 16)
    assert TinyModel(tmp_path / "out", tiny.adapters, ()).reference().generate(prompt, None, 16) == wanted


def test_more_adapters_than_a_page_of_the_listing(
    s3: S3Server, s3_bucket: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in s3.environment.items():
        monkeypatch.setenv(name, value)
    bucket = s3.store(s3_bucket)
    for number in range(600):  # 1200 keys
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            bucket.put(f"t{number:03}/{name}", b"{}")
    outcome = run(capsys, "list", f"s3://{s3_bucket}/{{adapter_id}}")
    assert [line.split()[-1] for line in outcome.out.splitlines()] == [f"t{number:03}" for number in range(600)]


def test_a_bucket_that_is_not_there(uri: str, tiny: TinyModel, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "list", "s3://no-such-bucket/{adapter_id}").assert_refused("cannot be listed", "NoSuchBucket")
    absent = run(capsys, "check", "a", "--model", tiny.path, "--adapter-uri", uri)
    assert absent.code == 1
    assert absent.out == "refused: a: there is no adapter 'a' in the store (adapter_not_found)\n"


def test_wrong_credentials_are_named(
    uri: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not the key")
    outcome = run(capsys, "pull", "a", "--adapter-uri", uri, "--disk-cache", tmp_path / "cache")
    assert outcome.code == 1
    assert outcome.err.startswith("loramux: a: adapter 'a': the adapter store denies access: ")
    assert outcome.err.count("\n") == 1
    run(capsys, "list", uri).assert_refused("cannot be listed")
