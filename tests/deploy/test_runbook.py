"""deploy/README.md and SECURITY.md name what there is: settings, alerts, metrics, files, limits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from deploy.manifests import DEPLOY
from loramux_schemas import adapter_names, headers, metadata, request
from loramux_worker.settings import WorkerSettings

RUNBOOK = (DEPLOY / "README.md").read_text()
THREATS = (DEPLOY / "SECURITY.md").read_text()
SOURCES = "".join(path.read_text() for path in (DEPLOY.parent / "worker").rglob("*.py"))
# flags of other programs
NOT_OURS = {"build", "file", "wait", "kustomize", "namespace", "force"}


@pytest.mark.parametrize("text", [RUNBOOK, THREATS], ids=["README", "SECURITY"])
def test_flags_and_variables_are_settings(text: str) -> None:
    flags = {name.replace("-", "_") for name in re.findall(r"(?<![\w-])--([a-z][a-z-]+)", text)}
    variables = {name.lower() for name in re.findall(r"\bLORAMUX_([A-Z_]+)", text)}
    assert variables | flags
    assert (flags | variables) - set(WorkerSettings.model_fields) <= NOT_OURS


def test_metrics_are_those_of_the_worker() -> None:
    named = set(re.findall(r"`(?:\w+\()?loramux_([a-z_]+)", RUNBOOK))
    assert len(named) > 8
    for name in named:
        stem = re.sub(r"_total$", "", name)
        stage = re.fullmatch(r"request_(\w+)_seconds", stem)
        assert f'"{stem}"' in SOURCES or f"loramux_{stem}" in SOURCES or (stage and f'"{stage[1]}"' in SOURCES), name


def test_log_events_are_those_of_the_worker() -> None:
    for event in [
        "kafka_unavailable",
        "kafka_back",
        "requests_lost_by_broker",
        "engine_died",
        "request_failed",
        "answer_refused",
        "adapter_store_failed",
        "adapter_cache_full",
        "partitions_lost",
        "requests_not_unpacked",
    ]:
        assert f"`{event}`" in RUNBOOK
        assert f'"{event}"' in SOURCES


def test_every_alert_has_its_remedy() -> None:
    rules = DEPLOY / "prometheus" / "rules.yaml"
    if not rules.exists():
        pytest.skip("there are no alerts yet")
    groups = yaml.safe_load(rules.read_text())["groups"]
    alerts = [rule["alert"] for group in groups for rule in group["rules"] if "alert" in rule]
    assert sorted(re.findall(r"^### (Loramux\w+)$", RUNBOOK, re.MULTILINE)) == sorted(alerts)


def test_paths_are_there() -> None:
    for path in re.findall(r"deploy/[\w./-]+", RUNBOOK):
        assert (DEPLOY.parent / path.rstrip(".")).exists(), path
    for path in re.findall(r"`((?:image|kubernetes|base|overlays|tests)/[\w./-]+)`", RUNBOOK + THREATS):
        places = [DEPLOY / path, DEPLOY / "kubernetes" / path, DEPLOY.parent / path]
        assert any(Path(place).exists() for place in places), path


def test_limits_are_those_of_the_contract() -> None:
    for number, said in (
        (metadata.MAX_METADATA_BYTES, "metadata | 16 KiB"),
        (headers.MAX_ECHOED_BYTES, "headers that are echoed | 16 KiB"),
    ):
        assert number == 16 * 1024
        assert said in THREATS
    for number in (
        request.MAX_MESSAGES,
        request.MAX_REQUEST_ID_CHARS,
        request.MAX_STOP_TOKEN_IDS,
        request.MAX_LOGPROBS,
        adapter_names.MAX_ADAPTER_NAME_CHARS,
        metadata.MAX_METADATA_DEPTH,
    ):
        assert f"{number:,}" in THREATS
