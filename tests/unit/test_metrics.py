"""Metrics of a worker: labels that stay few, and loads by the tiers they came from."""

from __future__ import annotations

import pytest
from prometheus_client import generate_latest

from loramux_schemas import ErrorCode, Timing
from loramux_worker import metrics as metrics_module
from loramux_worker.engine.protocol import AdapterMoved, AdapterReference, AdapterStats
from loramux_worker.metrics import Metrics, adapter_families


def labels_of(metrics: Metrics, name: str, label: str) -> set[str]:
    return {
        sample.labels[label]
        for family in metrics.registry.collect()
        for sample in family.samples
        if sample.name == f"loramux_{name}"
    }


def test_an_adapter_that_loses_its_label_leaves_no_series(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "_MAX_ADAPTER_LABELS", 3)
    metrics = Metrics()
    for adapter in ("a", "b", "c"):
        metrics.answered(adapter, 1, 1, Timing(total_ms=1))
    metrics.failed("a", ErrorCode.INTERNAL)
    metrics.answered(None, 1, 1, Timing())
    for _ in range(6):
        metrics.answered("late", 1, 1, Timing(total_ms=1))
    for name in ("requests_total", "tokens_total", "adapter_request_seconds_count"):
        labels = labels_of(metrics, name, "adapter")
        assert {"late", "base", "other", "a"} <= labels
        assert len(labels) == 5, "one of b and c is gone"
    for i in range(1000):
        metrics.answered(f"flood-{i}", 1, 1, Timing())
    assert len(labels_of(metrics, "requests_total", "adapter")) <= 5


def test_loads_are_observed_by_the_way_they_took() -> None:
    metrics = Metrics()
    for tier in ("disk", "host", "gpu"):
        metrics.moved(AdapterMoved(AdapterReference("a", "sha256:1", "/nowhere"), tier, 0.0, 0.3))
    page = generate_latest(metrics.registry).decode()
    for way in ('from="store",to="disk"', 'from="disk",to="host"', 'from="host",to="gpu"'):
        assert f"loramux_adapter_load_seconds_sum{{{way}}} 0.3" in page


def test_fairness_is_summed_over_engines_and_its_labels_stay_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "_MAX_ADAPTER_LABELS", 2)
    rows = [
        AdapterStats("a", 10.0, 1.0, 3, 1, 4, 0.0),
        AdapterStats("b", 8.0, 0.5, 2, 0, 1, 2.0),
        AdapterStats("other", 100.0, 9.0, 30, 0, 7, 0.0),
        AdapterStats("c", 9.0, 2.0, 1, 1, 0, 0.0),
        AdapterStats("a", 1.0, 0.0, 1, 2, 5, 6.0),
        AdapterStats("other", 0.0, 0.0, 0, 0, 0, 0.0),
    ]
    samples = {
        (sample.name, sample.labels["adapter"]): sample.value
        for family in adapter_families(rows)
        for sample in family.samples
    }
    assert {label for _, label in samples} == {"a", "c", "other"}
    assert samples["loramux_adapter_service_total", "a"] == 11.0
    assert samples["loramux_adapter_service_total", "other"] == 108.0
    assert samples["loramux_adapter_queue_seconds_total", "c"] == 2.0
    assert samples["loramux_adapter_started_total", "a"] == 4.0
    assert samples["loramux_adapter_running", "a"] == 3.0
    assert samples["loramux_adapter_waiting", "other"] == 8.0
    assert samples["loramux_adapter_deficit", "a"] == 6.0
