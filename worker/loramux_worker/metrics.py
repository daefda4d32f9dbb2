"""Prometheus metrics of a worker (DESIGN: prefix `loramux_`, seconds and bytes as units, bounded labels)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import nlargest

from prometheus_client import CollectorRegistry, Counter, Histogram, Summary
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, SummaryMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from loramux_schemas import ErrorCode, Timing
from loramux_worker.adapter_labels import OTHER, AdapterLabels
from loramux_worker.adapters.catalog import AdapterCatalog
from loramux_worker.engine.protocol import SOURCES, AdapterMoved, AdapterStats, Stats
from loramux_worker.kafka.exactly_once import ExactlyOnce
from loramux_worker.kafka.intake import Intake
from loramux_worker.kafka.publisher import Publisher
from loramux_worker.pool import EnginePool

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_MAX_ADAPTER_LABELS = 100
# from 0 on: the first failure is an increase too
_NO_LOOKUPS = {("store", code.value): 0 for code in ErrorCode if code.startswith("adapter_")}
_ADAPTER_FAMILIES: dict[str, tuple[type[CounterMetricFamily | GaugeMetricFamily], str]] = {
    "service_total": (CounterMetricFamily, "Weighted tokens that an adapter was given."),
    "queue_seconds_total": (CounterMetricFamily, "Time that requests waited for their turn, of those that began."),
    "started_total": (CounterMetricFamily, "Requests that began to run."),
    "running": (GaugeMetricFamily, "Requests of an adapter in the running batch."),
    "waiting": (GaugeMetricFamily, "Requests of an adapter that wait in an engine."),
    "deficit": (GaugeMetricFamily, "Weighted tokens that a waiting adapter got less than the most served one."),
}


class Metrics:
    """What the front counts. `registry` is what `/metrics` shows."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._labels = AdapterLabels(_MAX_ADAPTER_LABELS, self._forget)

        def counter(name: str, help_text: str, *labels: str) -> Counter:
            return Counter(f"loramux_{name}", help_text, labels, registry=self.registry)

        def histogram(name: str, help_text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"loramux_{name}", help_text, registry=self.registry, buckets=buckets)

        self.requests = counter("requests", "Requests answered.", "adapter", "outcome")
        self.duplicates = counter("duplicates", "Messages that came again and were answered from the first.")
        self.tokens = counter("tokens", "Tokens of answered requests.", "adapter", "kind")
        self.dead_letters = counter(
            "dead_letters", "Messages kept for a person: no request, or engines died of them.", "reason"
        )
        self.adapter_request = Summary(
            "loramux_adapter_request_seconds",
            "Time from Kafka's timestamp to the answer.",
            ["adapter"],
            registry=self.registry,
        )
        for reason in ("unparseable", "poison"):
            self.dead_letters.labels(reason)  # from 0 on: the first one is an increase too
        self.time_to_first_token = histogram("time_to_first_token_seconds", "From Kafka's timestamp on.")
        self.inter_token_latency = histogram(
            "inter_token_latency_seconds", "Mean time between two tokens of a request.", _TOKEN_SECONDS
        )
        self.adapter_load = Histogram(
            "loramux_adapter_load_seconds",
            "Time to bring an adapter from one tier to another (into the pool: as long as steps waited for it).",
            ("from", "to"),
            registry=self.registry,
            buckets=_SECONDS,
        )
        self.stages = {
            stage: histogram(f"request_{stage}_seconds", f"Time a request spent: {stage}.")
            for stage in ("queue", "adapter", "prefill", "decode", "total")
        }

    def answered(self, adapter_id: str | None, prompt_tokens: int, completion_tokens: int, timing: Timing) -> None:
        """Count a request that was answered with text."""
        label = self._labels.of(adapter_id)
        self.requests.labels(label, "ok").inc()
        self.tokens.labels(label, "prompt").inc(prompt_tokens)
        self.tokens.labels(label, "generated").inc(completion_tokens)
        self.adapter_request.labels(label).observe(timing.total_ms / 1000)
        for stage, histogram in self.stages.items():
            histogram.observe(getattr(timing, f"{stage}_ms") / 1000)
        self.time_to_first_token.observe((timing.total_ms - timing.decode_ms) / 1000)
        if completion_tokens > 1:
            self.inter_token_latency.observe(timing.decode_ms / 1000 / (completion_tokens - 1))

    def failed(self, adapter_id: str | None, code: str) -> None:
        """Count a request that was answered with an error."""
        self.requests.labels(self._labels.of(adapter_id), code).inc()

    def moved(self, moved: AdapterMoved) -> None:
        """Observe an adapter's way into a tier."""
        self.adapter_load.labels(SOURCES[moved.tier], moved.tier).observe(moved.seconds)

    def _forget(self, label: str) -> None:
        for metric in (self.requests, self.tokens, self.adapter_request):
            metric.remove_by_labels({"adapter": label})


class WorkerCollector(Collector):
    """What the worker's parts know of themselves, read when somebody looks."""

    def __init__(self, pool: EnginePool, intake: Intake, catalog: AdapterCatalog, publisher: Publisher) -> None:
        self._pool = pool
        self._intake = intake
        self._catalog = catalog
        self._publisher = publisher

    def collect(self) -> Iterator[Metric]:
        """Engines (their sum), tiers, partitions."""
        stats = self._pool.stats
        yield from self._engines(stats)
        yield from adapter_families([row for engine in stats for row in engine.adapters])
        yield from self._tiers(stats)
        by_partition = {
            "kafka_lag": ("Records of a partition that are not committed yet.", self._intake.lag()),
            "kafka_uncommitted": ("Answered records above the watermark.", self._intake.uncommitted()),
        }
        for name, (help_text, values) in by_partition.items():
            family = GaugeMetricFamily(f"loramux_{name}", help_text, labels=["partition"])
            for partition, value in values.items():
                family.add_metric([str(partition)], value)
            yield family
        yield _counter("lost_deltas", "Deltas that could not be sent.", self._publisher.lost_deltas)

    def _engines(self, stats: list[Stats]) -> Iterator[Metric]:
        used, blocks = _total(stats, "kv_blocks_used"), _total(stats, "kv_blocks")
        yield _gauge("requests_running", "Sequences in the running batch.", _total(stats, "running"))
        yield _gauge("requests_waiting", "Sequences that wait in an engine.", _total(stats, "waiting"))
        yield _gauge("kv_cache_usage_ratio", "Share of the KV blocks in use.", used / blocks if blocks else 0.0)
        yield _gauge("batch_sequences", "Sequences of the last step.", _total(stats, "batch_sequences"))
        yield _gauge("batch_adapters", "Distinct adapters of the last step.", _total(stats, "batch_adapters"))
        yield _gauge("batch_ranks", "Sum of the ranks of the running batch's adapters.", _total(stats, "batch_ranks"))
        yield _counter("preemptions", "Sequences put back for want of KV blocks.", _total(stats, "preemptions_total"))
        yield SummaryMetricFamily(
            "loramux_step_seconds",
            "Time of the steps run.",
            count_value=int(_total(stats, "steps_total")),
            sum_value=_total(stats, "step_seconds_total"),
        )
        yield _counter("engine_restarts", "Engine processes that died and were replaced.", self._pool.restarts)

    def _tiers(self, stats: list[Stats]) -> Iterator[Metric]:
        resident = GaugeMetricFamily("loramux_adapters_resident", "Adapters in a tier.", labels=["tier"])
        size = GaugeMetricFamily("loramux_adapter_bytes", "Bytes of adapters in a tier.", labels=["tier"])
        room = GaugeMetricFamily("loramux_adapter_capacity_bytes", "Bytes that a tier may take.", labels=["tier"])
        evictions = CounterMetricFamily("loramux_adapter_evictions", "Evictions.", labels=["tier"])
        lookups = CounterMetricFamily("loramux_adapter_lookups", "Lookups.", labels=["tier", "result"])
        for tier in ("gpu", "host"):
            resident.add_metric([tier], _total(stats, f"{tier}_adapters"))
            size.add_metric([tier], _total(stats, f"{tier}_bytes"))
            room.add_metric([tier], _total(stats, f"{tier}_capacity_bytes"))
            evictions.add_metric([tier], _total(stats, f"{tier}_evictions_total"))
            lookups.add_metric([tier, "hit"], _total(stats, f"{tier}_hits_total"))
            lookups.add_metric([tier, "miss"], _total(stats, f"{tier}_misses_total"))
        disk = self._catalog.disk
        resident.add_metric(["disk"], len(disk))
        size.add_metric(["disk"], disk.used_bytes)
        room.add_metric(["disk"], disk.quota_bytes)
        evictions.add_metric(["disk"], disk.evictions)
        for (tier, result), count in (_NO_LOOKUPS | self._catalog.stats.lookups).items():
            lookups.add_metric([tier, result], count)
        yield from (resident, size, room, evictions, lookups)


class TransactionCollector(Collector):
    """How the transactions of exactly-once delivery ended."""

    def __init__(self, exactly_once: ExactlyOnce) -> None:
        self._exactly_once = exactly_once

    def collect(self) -> Iterator[Metric]:
        """One counter."""
        family = CounterMetricFamily("loramux_transactions", "Transactions by their outcome.", labels=["outcome"])
        for outcome, count in self._exactly_once.transactions.items():
            family.add_metric([outcome], count)
        yield family


def adapter_families(rows: Sequence[AdapterStats]) -> Iterator[Metric]:
    """How each adapter fares in the fair queues of all engines; of too many, those that got least are `other`."""
    service: dict[str, float] = {}
    for row in rows:
        service[row.adapter] = service.get(row.adapter, 0.0) + row.service_total
    service.pop(OTHER, None)
    named = set(nlargest(_MAX_ADAPTER_LABELS, service, key=service.__getitem__))
    for name, (kind, help_text) in _ADAPTER_FAMILIES.items():
        values: dict[str, float] = {}
        for row in rows:
            label = row.adapter if row.adapter in named else OTHER
            values[label] = values.get(label, 0.0) + getattr(row, name)
        family = kind(f"loramux_adapter_{name.removesuffix('_total')}", help_text, labels=["adapter"])
        for label, value in values.items():
            family.add_metric([label], value)
        yield family


def _total(stats: list[Stats], field: str) -> float:
    return float(sum(getattr(s, field) for s in stats))


def _gauge(name: str, help_text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"loramux_{name}", help_text, value)


def _counter(name: str, help_text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"loramux_{name}", help_text, value)
