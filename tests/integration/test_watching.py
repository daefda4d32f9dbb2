"""One worker under load, watched: every query of the dashboards and rules, `loramux top`, traces and logs."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import re
import shutil
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import yaml
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from textual.widgets import DataTable

from loramux_producer import Client, ReplyFailed
from loramux_schemas import Reply
from loramux_worker.top.screen import Top
from services.kafka import KafkaCluster
from services.otlp import OtlpReceiver, ReceivedSpan
from services.prometheus import PrometheusServer
from services.serving import Serving, serving
from tiny_models import TinyModel, make_model

pytestmark = pytest.mark.kafka

PROJECT = Path(__file__).resolve().parents[2]
DASHBOARDS = PROJECT / "deploy" / "grafana" / "dashboards"
RULES = PROJECT / "deploy" / "prometheus" / "rules.yaml"
WINDOW = "6s"
NEW_ADAPTERS = 400
NEVER_ASKED = f"new/{NEW_ADAPTERS - 1}"
SECRET = "hf_a-word-that-nobody-may-read"
PROMPT = "a prompt that nobody may read"
VARIABLES = {"$job": "loramux", "$worker": ".*", "$adapter": ".*", "$window": WINDOW}
ABSENT = {
    "LoramuxErrors": "counts failures that are nobody's fault, and there is none: rules_test.yaml has it fire",
}
STAGES = {
    "kafka.queue",
    "prepare",
    "engine.adapter",
    "engine.queue",
    "engine.prefill",
    "engine.decode",
    "answer",
    "publish",
}
COMPARISON = re.compile(r" (==|<|>) \d+(\.\d+)?")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    tiny = make_model(tmp_path_factory.mktemp("model"), "llama", num_adapters=6)
    for i in range(NEW_ADAPTERS):
        shutil.copytree(tiny.adapters / tiny.adapter_ids[0], tiny.adapters / f"new/{i}")
    return tiny


@pytest.fixture(scope="module")
def collector() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(scope="module")
def served(kafka: KafkaCluster, model: TinyModel, collector: OtlpReceiver) -> Iterator[Serving]:
    """A worker with a KV cache that is too small for the load, its traces going to the collector."""
    flags = {"max_batch_sequences": 8, "kv_cache_memory": "256KiB", "max_model_len": 256}
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_BSP_SCHEDULE_DELAY", "100")
        environment.setenv("HF_TOKEN", SECRET)
        with serving(kafka, model, otlp_endpoint=collector.endpoint, **flags) as running:
            yield running


@pytest.mark.prometheus
async def test_every_query_and_every_rule_gives_data(served: Serving) -> None:
    rules_text = with_short_windows(RULES.read_text()).replace("interval: 30s", "interval: 1s")
    with PrometheusServer([served.worker.port], rules_text) as prometheus:
        async with load(served):
            recorded = {f"recorded {rule['record']}": rule["record"] for rule in rules() if "record" in rule}
            expressions = {**panel_queries(), **rule_expressions(), **recorded}
            silent = dict(expressions)
            until = time.monotonic() + 40
            while not set(silent) <= set(ABSENT) and time.monotonic() < until:
                await asyncio.sleep(0.5)
                silent = {
                    name: expr
                    for name, expr in silent.items()
                    if not has_data(await asyncio.to_thread(prometheus.query, expr))
                }
            assert set(silent) <= set(ABSENT)
    assert len(expressions) > 80


async def test_top_shows_the_worker(served: Serving) -> None:
    app = Top([f"http://127.0.0.1:{served.worker.port}/metrics"], every=0.5)
    async with load(served), app.run_test(size=(150, 45)) as pilot:
        until = time.monotonic() + 60
        while not (rows := rows_of(app, "busiest")) or rows_of(app, "workers")[0][8] == "0":
            assert time.monotonic() < until, "it shows nothing"
            await pilot.pause(0.2)
        (worker,) = rows_of(app, "workers")
        tiers = {tier: cells for tier, *cells in rows_of(app, "tiers")}
        await pilot.press("q")
    assert worker[1] == "ready"
    assert float(worker[2]) > 0
    assert {row[0].split("/")[0] for row in rows} <= {*(f"tenant-{i}" for i in range(6)), "new", "nobody", "other"}
    assert float(rows[0][1]) > 0
    assert int(tiers["gpu"][0]) >= 6
    assert tiers["disk"][1].endswith("iB")


def rows_of(app: Top, name: str) -> list[list[str]]:
    table = app.query_one(f"#{name}", DataTable)
    return [[str(cell) for cell in table.get_row_at(i)] for i in range(table.row_count)]


async def test_spans_follow_a_request_from_the_traceparent_to_the_reply(
    served: Serving, collector: OtlpReceiver
) -> None:
    trace, parent = uuid.uuid4().hex, uuid.uuid4().hex[:16]
    spans, reply = await traced(served, collector, f"00-{trace}-{parent}-01", adapter_id=NEVER_ASKED)
    assert reply.status == "ok"
    (root,) = [span for span in spans if span.parent_id == parent]
    children = [span for span in spans if span is not root]
    assert {span.parent_id for span in children} == {root.span_id}
    assert root.name == f"process {served.topics['requests_topic']}"
    assert root.service == "loramux"
    assert root.attributes["loramux.request_id"] == reply.request_id
    assert root.attributes["loramux.adapter_id"] == NEVER_ASKED
    assert root.attributes["loramux.revision"] == reply.revision
    assert root.attributes["gen_ai.usage.output_tokens"] == 5
    assert not root.is_error
    loads = {
        (span.attributes["loramux.tier.from"], span.attributes["loramux.tier.to"])
        for span in children
        if span.name == "adapter.load"
    }
    assert loads == {("store", "disk"), ("disk", "host"), ("host", "gpu")}
    stages = sorted((span for span in children if span.name != "adapter.load"), key=lambda span: span.start)
    assert {span.name for span in stages} == STAGES
    assert stages[0].start == root.start
    assert stages[-1].end == root.end
    assert all(before.end == after.start for before, after in itertools.pairwise(stages)), "no time is missing"
    milliseconds = {span.name: (span.end - span.start) / 1e6 for span in stages}
    assert milliseconds["engine.decode"] == pytest.approx(reply.timing.decode_ms, abs=1.0)
    assert milliseconds["engine.prefill"] == pytest.approx(reply.timing.prefill_ms, abs=1.0)


async def test_a_request_that_fails_has_a_span_that_says_so(served: Serving, collector: OtlpReceiver) -> None:
    trace, parent = uuid.uuid4().hex, uuid.uuid4().hex[:16]
    spans, reply = await traced(served, collector, f"00-{trace}-{parent}-01", adapter_id="nobody/here")
    (root,) = [span for span in spans if span.parent_id == parent]
    assert reply.error.code == "adapter_not_found"
    assert root.is_error
    assert root.attributes["error.type"] == "adapter_not_found"
    assert {span.name for span in spans if span is not root} == {"kafka.queue", "prepare", "answer", "publish"}


async def test_log_lines_name_the_request_and_hold_no_text(served: Serving) -> None:
    async with served.client() as client:
        reply = await client.generate(PROMPT, adapter_id="tenant-1/tune", max_new_tokens=40, ignore_eos=True)
        with suppress(ReplyFailed):
            await client.generate(PROMPT, adapter_id="nobody/here")
    wrong = {"request_id": "wrong", "prompt": PROMPT, "parameters": {"max_new_tokens": -1}}
    async with AIOKafkaProducer(bootstrap_servers=served.kafka.bootstrap_servers) as raw:
        await raw.send_and_wait(served.topics["requests_topic"], json.dumps(wrong).encode())
    until = time.monotonic() + 60
    while '"wrong"' not in (text := served.worker.log_path.read_text()):
        assert time.monotonic() < until, "it is not logged"
        await asyncio.sleep(0.05)
    lines = [json.loads(line) for line in text.splitlines() if line.startswith("{")]
    (answered,) = [line for line in lines if line.get("request_id") == reply.request_id]
    assert answered["event"] == "request_answered"
    assert (answered["adapter_id"], answered["revision"]) == (reply.adapter_id, reply.revision)
    assert {"partition", "offset", "level", "timestamp"} <= answered.keys()
    failed = [line for line in lines if line["event"] == "request_failed"]
    assert [line["code"] for line in failed[-2:]] == ["adapter_not_found", "invalid_request"]
    assert all({"partition", "offset", "adapter_id", "reason"} <= line.keys() for line in failed)
    for secret in (PROMPT, reply.generated_text, SECRET):
        assert secret not in text


async def traced(
    served: Serving, collector: OtlpReceiver, traceparent: str, adapter_id: str
) -> tuple[list[ReceivedSpan], Reply]:
    """Ask with a `traceparent`; the spans of its trace and the reply, which has the header too."""
    request = {"request_id": str(uuid.uuid4()), "adapter_id": adapter_id, "prompt": "x"}
    request["parameters"] = {"max_new_tokens": 5, "ignore_eos": True}
    headers = [("traceparent", traceparent.encode())]
    servers = served.kafka.bootstrap_servers
    async with (
        AIOKafkaConsumer(
            served.topics["replies_topic"], bootstrap_servers=servers, auto_offset_reset="latest"
        ) as replies,
        AIOKafkaProducer(bootstrap_servers=servers) as producer,
    ):
        await replies.seek_to_end()
        for partition in replies.assignment():
            await replies.position(partition)
        await producer.send_and_wait(served.topics["requests_topic"], json.dumps(request).encode(), headers=headers)
        async with asyncio.timeout(60):
            record = await replies.getone()
            while record.key.decode() != request["request_id"]:
                record = await replies.getone()
            trace = traceparent.split("-")[1]
            while not any(span.name == "publish" for span in collector.of_trace(trace)):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    assert ("traceparent", traceparent.encode()) in record.headers
    return collector.of_trace(trace), Reply.from_json(record.value)


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
        await client.generate("x", adapter_id=f"new/{i % (NEW_ADAPTERS - 1)}", max_new_tokens=2)
        with suppress(ReplyFailed):
            await client.generate("x", adapter_id="nobody/here")
        await raw.send_and_wait(topic, b"no request")
        await asyncio.sleep(0.1)
