"""Spans of requests, sent to a collector on loopback; the whole way of one is in test_watching.py."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from loramux_schemas import ErrorCode, Reply
from loramux_worker.engine.protocol import AdapterMoved, AdapterReference, SequenceTiming
from loramux_worker.errors import ConfigurationError
from loramux_worker.kafka.records import OutgoingRecord, Record
from loramux_worker.settings_sources import load_settings
from loramux_worker.stopwatch import Stopwatch
from loramux_worker.tracing import Tracing
from services.otlp import OtlpReceiver, ReceivedSpan

ADAPTER = AdapterReference("acme/pirate", "sha256:1", "/nowhere")
PARENT = "00-0123456789abcdef0123456789abcdef-0123456789abcdef-"


def record(traceparent: str | None = None) -> Record:
    headers = () if traceparent is None else (("traceparent", traceparent.encode()),)
    return Record("lora.requests", 3, 14, None, b"{}", headers, int(time.time() * 1000) - 50, 1)


def answer(**fields: object) -> OutgoingRecord:
    return OutgoingRecord("lora.replies", b"r-1", Reply(request_id="r-1", **fields).to_json())


async def spans_of(traceparent: str | None, *answers: OutgoingRecord, moved: AdapterMoved | None = None, engine=None):
    with OtlpReceiver() as receiver:
        tracing = Tracing(receiver.endpoint, "worker-1", "loramux")
        if moved is not None:
            tracing.moved(moved)
        watch = Stopwatch(int(time.time() * 1000) - 50)
        if engine is not None:
            watch.prepared()
        watch.timing(engine)
        tracing.answered(record(traceparent), answers, watch)
        await tracing.close()
        return receiver.spans


def root_of(spans: list[ReceivedSpan]) -> ReceivedSpan:
    ids = {span.span_id for span in spans}
    (root,) = [span for span in spans if span.parent_id not in ids]
    return root


async def test_without_a_traceparent_a_trace_begins() -> None:
    spans = await spans_of(None, answer(), engine=SequenceTiming(1, 0.0, 0.0, 0.0, 0.0))
    root = root_of(spans)
    assert root.parent_id == ""
    assert root.attributes["messaging.destination.partition.id"] == "3"
    assert root.attributes["messaging.kafka.offset"] == 14
    assert {span.trace_id for span in spans} == {root.trace_id}
    assert (root.end - root.start) / 1e6 >= 50, "the time in Kafka counts"


@pytest.mark.parametrize("broken", ["", "nonsense", "00-zz-1-01", PARENT])
async def test_a_traceparent_that_is_none_is_passed_over(broken: str) -> None:
    assert root_of(await spans_of(broken, answer())).parent_id == ""


async def test_what_the_caller_does_not_sample_is_not_sent() -> None:
    assert await spans_of(f"{PARENT}00", answer()) == []
    assert root_of(await spans_of(f"{PARENT}01", answer())).parent_id == "0123456789abcdef"


async def test_errors_and_dead_letters_say_so() -> None:
    reply = Reply.failure(ErrorCode.ADAPTER_NOT_FOUND, "no such", request_id="r-1")
    root = root_of(await spans_of(None, OutgoingRecord("lora.replies", None, reply.to_json())))
    assert (root.is_error, root.attributes["error.type"]) == (True, "adapter_not_found")
    letter = OutgoingRecord("lora.dead-letters", None, b"no request")
    for answers in ((letter,), (letter, answer())):
        root = root_of(await spans_of(None, *answers))
        assert (root.is_error, root.attributes["error.type"]) == (True, "dead_letter")


async def test_only_loads_that_the_request_may_have_waited_for_are_its_own() -> None:
    now = time.time()
    asked = {"adapter_id": ADAPTER.adapter_id, "revision": ADAPTER.revision}
    for ended, revision, counts in ((now + 60, "sha256:1", 1), (now - 5, "sha256:1", 0), (now + 60, "sha256:2", 0)):
        moved = AdapterMoved(ADAPTER, "host", ended, seconds=60)
        spans = await spans_of(None, answer(**{**asked, "revision": revision}), moved=moved)
        assert sum(span.name == "adapter.load" for span in spans) == counts


async def test_a_collector_that_is_away_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    tracing = Tracing("http://127.0.0.1:1", "worker-1", "loramux")
    tracing.answered(record(), (answer(),), Stopwatch(0))
    began = time.monotonic()
    await tracing.close()
    assert time.monotonic() - began < 10


def test_off_it_is_not_even_loaded() -> None:
    check = "import sys, loramux_worker.assembly; assert not [m for m in sys.modules if m.startswith('opentelemetry')]"
    subprocess.run([sys.executable, "-c", check], check=True)


def test_the_endpoint_is_a_flag_or_the_standard_variable(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    model = ["--model", str(tmp_path)]
    monkeypatch.delenv("OTEL_EXPORTER_OTLP_ENDPOINT", raising=False)
    assert load_settings(model).otlp_endpoint is None
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://collector:4318")
    assert load_settings(model).otlp_endpoint == "http://collector:4318"
    assert load_settings([*model, "--otlp-endpoint", "https://other"]).otlp_endpoint == "https://other"
    with pytest.raises(ConfigurationError, match="--otlp-endpoint"):
        load_settings([*model, "--otlp-endpoint", "collector:4317"])
