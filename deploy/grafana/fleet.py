"""All workers of a job: is the service well, and if not, which part of a request's way is it?"""

from __future__ import annotations

from grafana_foundation_sdk.builders.dashboard import Dashboard, Row
from panels import figure, lines, new_dashboard
from promql import ERRORS, STAGES, Metrics


def fleet() -> Dashboard:
    """All workers of a job together."""
    m = Metrics('job=~"$job"')
    answered = m.rate("requests_total")
    return (
        new_dashboard("fleet", "All workers together: is the service well, and where does a request's time go?")
        .with_panel(figure("workers ready", m.total("ready"), "short", "Workers whose /readyz says 200.", good_from=1))
        .with_panel(figure("requests a second", answered, "reqps", "Requests answered, errors included."))
        .with_panel(
            figure(
                "generated tokens a second",
                m.rate("tokens_total", more='kind="generated"'),
                "short",
                "Tokens of answered requests: they count when the request is done.",
            )
        )
        .with_panel(
            figure("lag", m.total("kafka_lag"), "short", "Requests in Kafka that are not committed as answered.")
        )
        .with_panel(
            figure(
                "p99 to first token",
                m.quantile(0.99, "time_to_first_token_seconds"),
                "s",
                "From the request's timestamp in Kafka on.",
                bad_from=10,
            )
        )
        .with_panel(
            figure(
                "errors",
                f"(sum(rate({m.of('requests_total', ERRORS)}[$window])) or vector(0)) / {answered}",
                "percentunit",
                "Share of the requests that were answered with an error.",
                bad_from=0.05,
            )
        )
        .with_row(Row("Load"))
        .with_panel(
            lines(
                "requests by outcome",
                "reqps",
                "ok, or the error code of the reply.",
                (m.rate("requests_total", "outcome"), "{{outcome}}"),
                stacked=True,
            )
        )
        .with_panel(
            lines(
                "tokens a second",
                "short",
                "Of answered requests.",
                (m.rate("tokens_total", "kind"), "{{kind}}"),
                stacked=True,
            )
        )
        .with_panel(
            lines(
                "lag by worker",
                "short",
                "Grows everywhere: too few workers. On one worker alone: look at that worker.",
                (m.total("kafka_lag", "instance"), "{{instance}}"),
                stacked=True,
            )
        )
        .with_row(Row("Latency"))
        .with_panel(
            lines(
                "time to first token",
                "s",
                "From the request's timestamp in Kafka on.",
                *m.quantiles("time_to_first_token_seconds"),
            )
        )
        .with_panel(
            lines(
                "time between tokens",
                "s",
                "The mean of each request: steps too large, or too many ranks in them, show here.",
                *m.quantiles("inter_token_latency_seconds"),
            )
        )
        .with_panel(
            lines("whole requests", "s", "From Kafka's timestamp to the answer.", *m.quantiles("request_total_seconds"))
        )
        .with_panel(
            lines(
                "where a request's time goes",
                "s",
                "Means. queue: in Kafka and for room in a batch. adapter: from the store to memory.",
                *((m.mean(f"request_{stage}_seconds"), stage) for stage in STAGES),
                stacked=True,
                span=12,
            )
        )
        .with_panel(
            lines(
                "p99 of each stage",
                "s",
                "The stage that a slow request is slow in.",
                *((m.quantile(0.99, f"request_{stage}_seconds"), stage) for stage in STAGES),
                span=12,
            )
        )
        .with_row(Row("Health"))
        .with_panel(
            lines(
                "workers",
                "short",
                "In the group, and ready.",
                (f"count({m.of('worker_info')})", "there"),
                (m.total("ready"), "ready"),
                (f"count({m.of('draining_seconds')} > 0) or vector(0)", "draining"),
            )
        )
        .with_panel(
            lines(
                "engine restarts",
                "short",
                "Engine processes that died: their requests go on in the next one. The worker's log says why.",
                (f"sum by (instance) (increase({m.of('engine_restarts_total')}[$window]))", "{{instance}}"),
            )
        )
        .with_panel(
            lines(
                "dead letters a minute",
                "short",
                "Messages that are no request: somebody produces to the topic who should not, or wrongly.",
                (f"60 * {m.rate('dead_letters_total', 'reason')}", "{{reason}}"),
            )
        )
        .with_panel(
            lines(
                "messages that came again",
                "reqps",
                "Answered from the first of their request_id: a producer repeats itself.",
                (m.rate("duplicates_total"), "a second"),
            )
        )
    )
