"""One worker, or some beside one another: batches, KV cache, partitions."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row
from panels import lines, new_dashboard, worker_choice
from promql import Metrics


def worker() -> Dashboard:
    """One worker, or some, line by line."""
    m = Metrics('job=~"$job",instance=~"$worker"')
    each = "{{instance}}"
    return (
        new_dashboard("worker", "Batches, KV cache and partitions of each worker.", worker_choice())
        .with_row(Row("Batch"))
        .with_panel(lines("sequences", "short", "Of the last step.", (m.total("batch_sequences", "instance"), each)))
        .with_panel(
            lines("adapters", "short", "Distinct ones of the last step.", (m.total("batch_adapters", "instance"), each))
        )
        .with_panel(
            lines(
                "sum of ranks",
                "short",
                "Of the batch's distinct adapters: what LoRA costs in a step (--max-batch-ranks).",
                (m.total("batch_ranks", "instance"), each),
            )
        )
        .with_panel(
            lines(
                "running and waiting",
                "short",
                "Sequences in the engines. Many that wait beside a small batch: no room in the KV cache or the pool.",
                (m.total("requests_running", "instance"), f"{each} running"),
                (m.total("requests_waiting", "instance"), f"{each} waiting"),
            )
        )
        .with_panel(
            lines(
                "step",
                "s",
                "Mean time of a step, waiting for the device included.",
                (m.mean("step_seconds", "instance"), each),
            )
        )
        .with_panel(
            lines(
                "steps a second",
                "short",
                "0 under load: the engine hangs.",
                (m.rate("step_seconds_count", "instance"), each),
            )
        )
        .with_row(Row("Memory"))
        .with_panel(
            lines(
                "KV cache",
                "percentunit",
                "Blocks in use. Full for long: sequences are preempted and computed again.",
                (m.of("kv_cache_usage_ratio"), each),
            )
        )
        .with_panel(
            lines(
                "preemptions a second",
                "short",
                "Sequences put back for want of KV blocks: more memory, or --max-batch-sequences smaller.",
                (m.rate("preemptions_total", "instance"), each),
            )
        )
        .with_panel(
            lines(
                "requests in hand",
                "short",
                "Not answered yet, at most --look-ahead; parked: beyond their adapter's share, at most --max-parked.",
                (m.of("requests_in_flight"), each),
                (m.of("requests_parked"), "parked {{instance}}"),
            )
        )
        .with_row(Row("Kafka"))
        .with_panel(lines("lag", "short", "By partition.", (m.total("kafka_lag", "partition"), "{{partition}}")))
        .with_panel(
            lines(
                "answered above the watermark",
                "short",
                "Requests of a partition that are answered while an older one is not.",
                (m.total("kafka_uncommitted", "partition"), "{{partition}}"),
            )
        )
        .with_panel(
            lines("drain", "s", "Time since SIGTERM; it ends at --drain-timeout.", (m.of("draining_seconds"), each))
        )
        .with_panel(
            lines(
                "transactions a second",
                "short",
                "Of exactly-once delivery, by how they ended.",
                (m.rate("transactions_total", "outcome"), "{{outcome}}"),
            )
        )
        .with_panel(
            lines(
                "lost deltas a minute",
                "short",
                "Pieces of streams that Kafka did not take; the replies are whole.",
                (f"60 * {m.rate('lost_deltas_total', 'instance')}", each),
            )
        )
        .with_panel(lines("ready", "short", "1 while /readyz says 200.", (m.of("ready"), each)))
    )
