"""Dashboards and rules: in step with what they are generated from, and every expression gives data from a worker."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import re
import shutil
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import yaml
from aiokafka import AIOKafkaProducer

from loramux_producer import Client, ReplyFailed
from services.kafka import KafkaCluster
from services.prometheus import PrometheusServer, program
from services.serving import Serving, serving
from tiny_models import TinyModel, make_model

PROJECT = Path(__file__).resolve().parents[2]
DASHBOARDS = PROJECT / "deploy" / "grafana" / "dashboards"
RULES = PROJECT / "deploy" / "prometheus" / "rules.yaml"
WINDOW = "6s"
NEW_ADAPTERS = 400
VARIABLES = {"$job": "loramux", "$worker": ".*", "$adapter": ".*", "$window": WINDOW}
ABSENT = {
    "LoramuxErrors": "counts failures that are nobody's fault, and there is none: rules_test.yaml has it fire",
}
COMPARISON = re.compile(r" (==|<|>) \d+(\.\d+)?")


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
    tested = yaml.safe_load(RULES.with_name("rules_test.yaml").read_text())["tests"]
    fired = {case["alertname"] for test in tested for case in test.get("alert_rule_test", []) if case["exp_alerts"]}
    assert fired == {rule["alert"] for rule in rules() if "alert" in rule}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    tiny = make_model(tmp_path_factory.mktemp("model"), "llama", num_adapters=6)
    for i in range(NEW_ADAPTERS):
        shutil.copytree(tiny.adapters / tiny.adapter_ids[0], tiny.adapters / f"new/{i}")
    return tiny


@pytest.fixture(scope="module")
def served(kafka: KafkaCluster, model: TinyModel) -> Iterator[Serving]:
    """A worker with a KV cache that is too small for the load."""
    with serving(kafka, model, max_batch_sequences=8, kv_cache_memory="256KiB", max_model_len=256) as running:
        yield running


@pytest.mark.kafka
@pytest.mark.prometheus
async def test_every_query_and_every_rule_gives_data(served: Serving) -> None:
    rules_text = with_short_windows(RULES.read_text()).replace("interval: 30s", "interval: 1s")
    with PrometheusServer([served.worker.port], rules_text) as prometheus:
        async with load(served):
            expressions = {**panel_queries(), **rule_expressions()}
            silent = dict(expressions)
            until = time.monotonic() + 40
            while set(silent) != set(ABSENT) and time.monotonic() < until:
                await asyncio.sleep(0.5)
                silent = {
                    name: expr
                    for name, expr in silent.items()
                    if not has_data(await asyncio.to_thread(prometheus.query, expr))
                }
            assert set(silent) == set(ABSENT)
            for rule in rules():
                if "record" in rule:
                    assert has_data(await asyncio.to_thread(prometheus.query, rule["record"])), rule["record"]
    assert len(expressions) > 80


def has_data(samples: list[dict]) -> bool:
    return any(not math.isnan(float(sample["value"][1])) for sample in samples)


def panel_queries() -> dict[str, str]:
    """Every query of every panel, with its variables filled in."""
    queries = {}
    for path in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", []):
                expr = target["expr"]
                for name, value in VARIABLES.items():
                    expr = expr.replace(name, value)
                assert "$" not in expr, expr
                queries[f"{path.stem}: {panel['title']} {target['refId']}"] = expr
    return queries


def rules() -> list[dict]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def rule_expressions() -> dict[str, str]:
    """Every rule's expression; what an alert compares with a bound is compared with none, so that it is there."""
    return {
        rule.get("alert") or rule["record"]: with_short_windows(COMPARISON.sub(" > -Inf", rule["expr"]))
        for rule in rules()
    }


def with_short_windows(text: str) -> str:
    return re.sub(r"\[\d+m\]", f"[{WINDOW}]", text)


@asynccontextmanager
async def load(served: Serving) -> AsyncIterator[None]:
    """Requests of every kind until the end of the block: answered, failing, streaming, and what is no request."""
    async with served.client() as client, AIOKafkaProducer(bootstrap_servers=served.kafka.bootstrap_servers) as raw:
        tasks = [asyncio.create_task(ask(client, served.model.adapter_ids, i)) for i in range(12)]
        tasks.append(asyncio.create_task(bother(client, raw, served.topics["requests_topic"])))
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


async def ask(client: Client, adapter_ids: tuple[str, ...], i: int) -> None:
    while True:
        await client.generate(f"question {i}", adapter_id=adapter_ids[i % 6], max_new_tokens=30, ignore_eos=True)


async def bother(client: Client, raw: AIOKafkaProducer, topic: str) -> None:
    """Adapters that were never asked for, a name that leads nowhere, and bytes that are no request."""
    for i in itertools.count():
        await client.generate("x", adapter_id=f"new/{i % NEW_ADAPTERS}", max_new_tokens=2)
        with suppress(ReplyFailed):
            await client.generate("x", adapter_id="nobody/here")
        await raw.send_and_wait(topic, b"no request")
        await asyncio.sleep(0.1)
