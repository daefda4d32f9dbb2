"""The rows that are shown: texts, ready to print."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import nlargest
from urllib.parse import urlsplit

from loramux_worker.top.change import Change, growth, mean, quantile, rate, rates, ratio, total

Row = tuple[str, ...]

WORKERS = (
    "worker", "state", "req/s", "err/s", "tok/s", "p99 TTFT", "lag", "in hand",
    "sequences", "adapters", "Σ ranks", "waiting", "KV", "step",
)  # fmt: skip
TIERS = ("tier", "adapters", "bytes", "full", "hits", "evicted/s", "load")
ADAPTERS = ("adapter", "req/s", "tok/s", "mean", "errors")
OUTCOMES = ("outcome", "req/s", "since start")

_SOURCES = {"disk": "store", "host": "disk", "gpu": "host"}


@dataclass(frozen=True, slots=True)
class Watched:
    """A worker's page: what changed lately, or why it cannot be read."""

    url: str
    change: Change | None = None
    trouble: str = "not read yet"

    @property
    def name(self) -> str:
        """Its address, as short as it goes."""
        return urlsplit(self.url).netloc


def changes(watched: Sequence[Watched]) -> list[Change]:
    """Those of the workers that could be read."""
    return [each.change for each in watched if each.change is not None]


def worker_rows(watched: Sequence[Watched]) -> list[Row]:
    """A row for each worker, and one for all where there are several."""
    rows = [
        (each.name, f"away: {each.trouble}", *[""] * (len(WORKERS) - 2))
        if each.change is None
        else (each.name, _state(each.change), *_worker(each.change))
        for each in watched
    ]
    if len(watched) > 1 and (together := changes(watched)):
        ready = int(total(together, "ready"))
        rows.append(("together", f"{ready} of {len(watched)} ready", *_worker(*together)))
    return rows


def tier_rows(together: Sequence[Change]) -> list[Row]:
    """Where adapters are, from the nearest tier to the store."""
    return [_tier(together, tier) for tier in ("gpu", "host", "disk", "store")]


def busiest(together: Sequence[Change], limit: int) -> list[Row]:
    """The adapters with the most requests."""
    requests = rates(together, "requests_total", "adapter")
    return [_adapter(together, adapter, requests) for adapter in _largest(requests, limit)]


def slowest(together: Sequence[Change], limit: int) -> list[Row]:
    """The adapters whose answers took longest, in the mean."""
    seconds = growth(together, "adapter_request_seconds_sum", "adapter")
    counts = growth(together, "adapter_request_seconds_count", "adapter")
    means = {adapter: seconds[adapter] / count for adapter, count in counts.items() if count}
    requests = rates(together, "requests_total", "adapter")
    return [_adapter(together, adapter, requests) for adapter in _largest(means, limit)]


def outcome_rows(together: Sequence[Change]) -> list[Row]:
    """What became of requests, dead letters and engines."""
    now = rates(together, "requests_total", "outcome")
    so_far: defaultdict[str, float] = defaultdict(float)
    for change in together:
        for sample in change.new.of("requests_total"):
            so_far[sample.labels["outcome"]] += sample.value
    rows: list[Row] = [
        (outcome, _number(now[outcome]), f"{so_far[outcome]:.0f}") for outcome in _largest(so_far, len(so_far))
    ]
    for name, metric in (("dead letters", "dead_letters_total"), ("engine restarts", "engine_restarts_total")):
        rows.append((name, _number(rate(together, metric)), f"{total(together, metric):.0f}"))
    return rows


def tokens_per_second(together: Sequence[Change]) -> float:
    """Generated tokens of answered requests."""
    return rate(together, "tokens_total", kind="generated")


def _state(change: Change) -> str:
    if change.new.total("draining_seconds"):
        return f"draining {change.new.total('draining_seconds'):.0f} s"
    return "ready" if change.new.total("ready") else "not ready"


def _worker(*together: Change) -> Row:
    failed = rate(together, "requests_total") - rate(together, "requests_total", outcome="ok")
    usage = ratio(total(together, "kv_cache_usage_ratio"), len(together))
    return (
        _number(rate(together, "requests_total")),
        _number(failed),
        _number(tokens_per_second(together)),
        _duration(quantile(together, "time_to_first_token_seconds", 0.99)),
        *(
            f"{total(together, name):.0f}"
            for name in ("kafka_lag", "requests_in_flight", "batch_sequences", "batch_adapters", "batch_ranks")
        ),
        f"{total(together, 'requests_waiting'):.0f}",
        _percent(usage),
        _duration(mean(together, "step_seconds")),
    )


def _tier(together: Sequence[Change], tier: str) -> Row:
    lookups = growth(together, "adapter_lookups_total", "result", tier=tier)
    hits = _percent(ratio(lookups["hit"], sum(lookups.values())))
    if tier == "store":
        return (tier, "", "", "", hits, "", "")
    size = total(together, "adapter_bytes", tier=tier)
    load = mean(together, "adapter_load_seconds", **{"from": _SOURCES[tier], "to": tier})
    return (
        tier,
        f"{total(together, 'adapters_resident', tier=tier):.0f}",
        _bytes(size),
        _percent(ratio(size, total(together, "adapter_capacity_bytes", tier=tier))),
        hits,
        _number(rate(together, "adapter_evictions_total", tier=tier)),
        _duration(load),
    )


def _adapter(together: Sequence[Change], adapter: str, requests: Mapping[str, float]) -> Row:
    ok = rate(together, "requests_total", adapter=adapter, outcome="ok")
    return (
        adapter,
        _number(requests[adapter]),
        _number(rate(together, "tokens_total", adapter=adapter, kind="generated")),
        _duration(mean(together, "adapter_request_seconds", adapter=adapter)),
        _percent(ratio(max(0.0, requests[adapter] - ok), requests[adapter])),
    )


def _largest(values: Mapping[str, float], limit: int) -> list[str]:
    """The names of the largest values that are not 0."""
    return nlargest(limit, (name for name, value in values.items() if value), key=lambda name: values[name])


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.0%}"


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.1f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def _bytes(value: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
