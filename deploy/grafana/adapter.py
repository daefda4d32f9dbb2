"""Who asks, who waits, who fails."""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard
from panels import choice, lines, new_dashboard
from promql import ERRORS, Metrics


def adapter() -> Dashboard:
    """Who asks, who waits, who fails; the least busy adapters share the name `other`."""
    m = Metrics('job=~"$job",adapter=~"$adapter"')
    all_tokens = Metrics('job=~"$job"').rate("tokens_total", more='kind="generated"')
    each = "{{adapter}}"
    requests, tokens = m.rate("requests_total", "adapter"), m.rate("tokens_total", "adapter", 'kind="generated"')
    answered = m.rate("requests_total", "adapter", 'outcome="ok"')
    turns = m.rate("adapter_queue_seconds_total", "adapter"), m.rate("adapter_started_total", "adapter")
    return (
        new_dashboard(
            "adapter",
            "The busiest, the slowest and the failing adapters. A worker names 100, the rest are `other`.",
            choice("adapter", "label_values(loramux_requests_total, adapter)"),
        )
        .with_panel(lines("busiest by requests", "reqps", "Ten of them.", (f"topk(10, {requests})", each), span=12))
        .with_panel(lines("busiest by tokens", "short", "Ten of them.", (f"topk(10, {tokens})", each), span=12))
        .with_panel(
            lines(
                "slowest",
                "s",
                "Mean time of an answered request, ten adapters: long answers, a flood of their own, or slow to load.",
                (f"topk(10, {m.mean('adapter_request_seconds', 'adapter')})", each),
                span=12,
            )
        )
        .with_panel(
            lines(
                "failing",
                "reqps",
                "Error replies, ten adapters.",
                (f"topk(10, {m.rate('requests_total', 'adapter, outcome', ERRORS)})", f"{each} {{{{outcome}}}}"),
                span=12,
            )
        )
        .with_panel(
            lines(
                "share of all generated tokens",
                "percentunit",
                "Who uses the machine: fairness lets one adapter have much only while others want little.",
                (f"topk(10, {tokens} / ignoring(adapter) group_left {all_tokens})", each),
                stacked=True,
                span=12,
            )
        )
        .with_panel(
            lines(
                "tokens of an answer",
                "short",
                "Mean number of generated tokens, ten adapters.",
                (f"topk(10, {tokens} / {answered})", each),
                span=12,
            )
        )
        .with_panel(
            lines(
                "waiting for their turn",
                "s",
                "Mean time in the fair queue of those that began, ten adapters. Only a flood of one's own is felt.",
                (f"topk(10, {' / '.join(turns)})", each),
            )
        )
        .with_panel(
            lines(
                "furthest behind",
                "short",
                "Weighted tokens that a waiting adapter got less than the most served one: bounded, if all is fair.",
                (f"topk(10, {m.total('adapter_deficit', 'adapter')})", each),
            )
        )
        .with_panel(
            lines(
                "backlog in the engines",
                "short",
                "Requests that wait, ten adapters; what the window does not hold waits in Kafka.",
                (f"topk(10, {m.total('adapter_waiting', 'adapter')})", each),
            )
        )
    )
