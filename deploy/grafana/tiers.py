"""Where adapters are, and what it costs to bring them nearer."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard
from panels import lines, new_dashboard, worker_choice
from promql import Metrics


def tiers() -> Dashboard:
    """Where adapters are, and what it costs to bring them nearer."""
    m = Metrics('job=~"$job",instance=~"$worker"')
    tier = "{{tier}}"
    hits = m.rate("adapter_lookups_total", "tier", 'result="hit"')
    way = "{{from}} to {{to}}"
    return (
        new_dashboard("tiers", "store → disk → host memory → device pool: residents, hits, loads.", worker_choice())
        .with_panel(
            lines(
                "hit ratio",
                "percentunit",
                "Of lookups. A low one with many evictions: the tier is too small for what is asked for.",
                (f"{hits} / {m.rate('adapter_lookups_total', 'tier')}", tier),
            )
        )
        .with_panel(lines("residents", "short", "Adapters.", (m.total("adapters_resident", "tier"), tier)))
        .with_panel(
            lines("evictions a second", "short", "All workers.", (m.rate("adapter_evictions_total", "tier"), tier))
        )
        .with_panel(
            lines(
                "bytes",
                "bytes",
                "In each tier (--adapter-memory, --host-memory, --disk-quota).",
                (m.total("adapter_bytes", "tier"), tier),
            )
        )
        .with_panel(
            lines(
                "fill",
                "percentunit",
                "Bytes over what the tier may take: full is as it should be, in a tier that caches.",
                (f"{m.total('adapter_bytes', 'tier')} / {m.total('adapter_capacity_bytes', 'tier')}", tier),
            )
        )
        .with_panel(
            lines(
                "lookups",
                "short",
                "A second. Of the store: hit, or the error code.",
                (m.rate("adapter_lookups_total", "tier, result"), "{{tier}} {{result}}"),
            )
        )
        .with_panel(
            lines("loads a second", "short", "Into each tier.", (m.rate("adapter_load_seconds_count", "from, to"), way))
        )
        .with_panel(
            lines(
                "p99 of a load",
                "s",
                "store to disk: the network. disk to host: the disk, or no room. host to gpu: so long do steps wait.",
                (m.quantile(0.99, "adapter_load_seconds", "from, to"), way),
            )
        )
        .with_panel(
            lines(
                "what requests wait for adapters",
                "s",
                "From the store to memory; 0 for most is the aim.",
                *m.quantiles("request_adapter_seconds"),
            )
        )
    )
