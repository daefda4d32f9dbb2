"""deploy/compose.yaml: its worker is set up with real settings, and what it mounts and waits for is there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from deploy.manifests import DEPLOY, duration, settings
from deploy.test_kubernetes import LEAVE_SECONDS
from loramux_worker.settings import WorkerSettings

# What we use of the compose specification; a key that is not here is a misspelt one.
SERVICE_KEYS = {
    "image",
    "build",
    "command",
    "environment",
    "ports",
    "volumes",
    "healthcheck",
    "depends_on",
    "user",
    "read_only",
    "cap_drop",
    "security_opt",
    "mem_limit",
    "pids_limit",
    "stop_grace_period",
    "tmpfs",
    "deploy",
}
HEALTH_KEYS = {"test", "interval", "timeout", "retries", "start_period"}
BOTH = ["compose.yaml", "compose.gpu.yaml"]


def compose(name: str = "compose.yaml") -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load((DEPLOY / name).read_text())
    return loaded


def test_keys_are_known() -> None:
    for name in BOTH:
        whole = compose(name)
        assert set(whole) <= {"name", "services", "volumes"}
        for service in whole["services"].values():
            assert set(service) <= SERVICE_KEYS
            assert set(service.get("healthcheck", {})) <= HEALTH_KEYS


def test_the_services_of_the_issue_are_there_and_pinned() -> None:
    services = compose()["services"]
    assert set(services) == {"kafka", "s3", "worker", "prometheus", "grafana"}
    for service in services.values():
        assert ":" in service["image"]
        assert not service["image"].endswith(":latest")


def test_the_worker_is_set_up_with_real_settings(tmp_path: Path) -> None:
    one, gpu = compose()["services"]["worker"], compose("compose.gpu.yaml")["services"]["worker"]
    command, *flags = one["command"]
    assert command == "worker"
    for variables in (one["environment"], one["environment"] | gpu["environment"]):
        chosen = settings(variables, flags, tmp_path)
        assert duration(one["stop_grace_period"]) >= chosen.drain_timeout + LEAVE_SECONDS
        assert f"{chosen.bootstrap_servers.partition(':')[0]}" in compose()["services"]


def test_the_worker_may_write_where_it_must_alone() -> None:
    worker = compose()["services"]["worker"]
    assert worker["read_only"]
    assert worker["user"] == "10001:10001"
    assert worker["cap_drop"] == ["ALL"]
    assert [volume.split(":")[1] for volume in worker["volumes"]] == ["/cache"]
    assert [mount.split(":")[0] for mount in worker["tmpfs"]] == ["/tmp"]


def test_ports_are_open_to_this_machine_alone() -> None:
    for service in compose()["services"].values():
        for port in service.get("ports", ()):
            assert port.startswith("127.0.0.1:"), port


def test_what_is_mounted_and_waited_for_is_there() -> None:
    whole = compose()
    for service in whole["services"].values():
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            assert source in whole["volumes"] or (DEPLOY / source).is_dir(), volume
        for name, condition in service.get("depends_on", {}).items():
            assert condition == {"condition": "service_healthy"}
            assert "healthcheck" in whole["services"][name]
    build = whole["services"]["worker"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
    stages = re.findall(r" AS (\w+)$", (DEPLOY / "Dockerfile").read_text(), re.MULTILINE)
    assert {build["target"], compose("compose.gpu.yaml")["services"]["worker"]["build"]["target"]} <= set(stages)


def test_prometheus_scrapes_the_worker() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yaml").read_text())
    [job] = config["scrape_configs"]
    [names] = job["dns_sd_configs"]
    assert names["names"] == ["worker"]
    assert names["port"] == WorkerSettings.model_fields["http_port"].default
    assert "LORAMUX_HTTP_HOST=0.0.0.0" in (DEPLOY / "Dockerfile").read_text()


def test_grafana_finds_its_data_and_dashboards() -> None:
    provisioning = DEPLOY / "grafana" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    [provider] = yaml.safe_load((provisioning / "dashboards" / "loramux.yaml").read_text())["providers"]
    mounts = dict(volume.split(":")[:2] for volume in compose()["services"]["grafana"]["volumes"])
    assert mounts["./grafana/dashboards"] == provider["options"]["path"]
