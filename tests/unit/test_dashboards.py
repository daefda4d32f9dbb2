"""Dashboards and rules as files: in step with what they are generated from, and every alert can fire."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from services.prometheus import program

PROJECT = Path(__file__).resolve().parents[2]
DASHBOARDS = PROJECT / "deploy" / "grafana" / "dashboards"
RULES = PROJECT / "deploy" / "prometheus" / "rules.yaml"


def test_the_dashboards_are_what_the_generator_writes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, PROJECT / "deploy/grafana/generate.py", "--out", tmp_path], check=True)
    written, kept = (
        {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")} for folder in (tmp_path, DASHBOARDS)
    )
    assert sorted(kept) == ["adapter.json", "fleet.json", "tiers.json", "worker.json"]
    assert written == kept, "run python deploy/grafana/generate.py"


@pytest.mark.prometheus
@pytest.mark.parametrize("command", [("check", "rules.yaml"), ("test", "rules_test.yaml")])
def test_promtool(command: tuple[str, str]) -> None:
    word, file = command
    run = subprocess.run([program("promtool"), word, "rules", file], cwd=RULES.parent, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_every_alert_has_a_test() -> None:
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    tested = yaml.safe_load(RULES.with_name("rules_test.yaml").read_text())["tests"]
    fired = {case["alertname"] for test in tested for case in test.get("alert_rule_test", []) if case["exp_alerts"]}
    assert fired == {rule["alert"] for rule in rules if "alert" in rule}
