"""`loramux adapters list`: what a store holds, as it is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from adapters_cli import SilentServer, interrupted_when, run

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def put(root: Path, place: str, *names: str, size: int = 10, at: float = 1e9) -> None:
    (root / place).mkdir(parents=True, exist_ok=True)
    for name in names:
        (root / place / name).write_bytes(b"x" * size)
        os.utime(root / place / name, (at, at))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    put(tmp_path, "acme/pirate", CONFIG, WEIGHTS, size=1000, at=1_700_000_000)
    put(tmp_path, "acme/pirate/checkpoint-1", CONFIG, WEIGHTS)
    put(tmp_path, "plain", CONFIG, WEIGHTS, "tokenizer.json")
    put(tmp_path, "half", CONFIG)
    put(tmp_path, "pickle", CONFIG, "adapter_model.bin")
    put(tmp_path, "weights only", WEIGHTS)
    put(tmp_path, "no name", CONFIG, WEIGHTS)  # no request can hold it
    return tmp_path


def test_folders_with_both_files(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run(capsys, "list", f"file://{root}/{{adapter_id}}")
    assert outcome.code == 0
    lines = sorted(outcome.out.splitlines(), key=lambda line: line.split()[-1])
    assert lines == [
        "   2.0 KiB  2023-11-14 22:13:20Z  acme/pirate",
        "      20 B  2001-09-09 01:46:40Z  acme/pirate/checkpoint-1",
        "      20 B  2001-09-09 01:46:40Z  plain",
    ]
    assert outcome.err == "3 adapters, 2.0 KiB\n"


def test_json_lines(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run(capsys, "list", f"file://{root}/acme/{{adapter_id}}", "--json")
    found = {line["adapter"]: line for line in map(json.loads, outcome.out.splitlines())}
    assert found.keys() == {"pirate", "pirate/checkpoint-1"}
    assert found["pirate"]["bytes"] == 2000
    assert datetime.fromisoformat(found["pirate"]["last_modified"]) == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    assert outcome.err == ""


def test_text_around_the_id_counts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for place in ("v1-a/lora", "v1-b/c/lora", "v2-d/lora", "v1-e/full", "v1-f/lora/more"):
        put(tmp_path, place, CONFIG, WEIGHTS)
    outcome = run(capsys, "list", f"file://{tmp_path}/v1-{{adapter_id}}/lora")
    assert {line.split()[-1] for line in outcome.out.splitlines()} == {"a", "b/c"}
    put(tmp_path, "twice/x/x.1", CONFIG, WEIGHTS)
    put(tmp_path, "twice/x/y.1", CONFIG, WEIGHTS)
    outcome = run(capsys, "list", f"file://{tmp_path}/twice/{{adapter_id}}/{{adapter_id}}.1")
    assert [line.split()[-1] for line in outcome.out.splitlines()] == ["x"]


def test_limit(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run(capsys, "list", f"file://{root}/{{adapter_id}}", "--limit", 2)
    assert outcome.code == 0
    assert len(outcome.out.splitlines()) == 2
    assert outcome.err.startswith("2 adapters, ")
    assert outcome.err.endswith("stopped there by --limit\n")


def test_an_empty_store_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run(capsys, "list", f"file://{tmp_path}/{{adapter_id}}")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "0 adapters, 0 B\n")


def test_what_cannot_be_listed_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(capsys, "list", "https://x.test/{adapter_id}").assert_refused("a plain web server cannot list")
    run(capsys, "list", f"file://{tmp_path}/absent/{{adapter_id}}").assert_refused("there is no folder")
    run(capsys, "list", f"file://{tmp_path}").assert_refused("has no {adapter_id}")
    run(capsys, "list", "hf://x/{adapter_id}").assert_refused("hf://")


def test_the_commands_import_nothing_heavy_before_they_need_it() -> None:
    heavy = {"torch", "transformers", "obstore", "structlog", "pydantic_settings", "safetensors"}
    program = f"import sys, loramux_worker.cli as cli; cli.adapters; print(*{heavy} & sys.modules.keys())"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "\n"


def test_ctrl_c_ends_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "x")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "x")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    with SilentServer() as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url)
        with interrupted_when(server.reached.is_set):
            outcome = run(capsys, "list", "s3://bucket/{adapter_id}")
    assert (outcome.code, outcome.out) == (130, "")
    assert "Traceback" not in outcome.err
