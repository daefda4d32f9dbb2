"""What happened between two snapshots: rates, means and quantiles, of one worker or of several together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from loramux_worker.top.snapshot import Snapshot


@dataclass(frozen=True, slots=True)
class Change:
    """From an older snapshot of a worker to a newer one; `old` None: it has just been seen for the first time."""

    old: Snapshot | None
    new: Snapshot

    @property
    def seconds(self) -> float:
        """Time between the two."""
        return 0.0 if self.old is None else self.new.at - self.old.at

    def growth(self, name: str, by: str = "", **labels: str) -> defaultdict[str, float]:
        """How much a counter grew, by the values of a label.

        A counter that is smaller than before began anew with its worker: all that it has came since.
        """
        grown: defaultdict[str, float] = defaultdict(float)
        if self.old is None:
            return grown
        before = {frozenset(sample.labels.items()): sample.value for sample in self.old.of(name, **labels)}
        for sample in self.new.of(name, **labels):
            was = before.get(frozenset(sample.labels.items()), 0.0)
            grown[sample.labels.get(by, "")] += sample.value - was if sample.value >= was else sample.value
        return grown


def growth(changes: Sequence[Change], name: str, by: str = "", **labels: str) -> defaultdict[str, float]:
    """How much a counter grew on all workers together, by the values of a label."""
    grown: defaultdict[str, float] = defaultdict(float)
    for change in changes:
        for value, more in change.growth(name, by, **labels).items():
            grown[value] += more
    return grown


def rates(changes: Sequence[Change], name: str, by: str, **labels: str) -> defaultdict[str, float]:
    """A counter's growth a second on all workers together, by the values of a label."""
    summed: defaultdict[str, float] = defaultdict(float)
    for change in changes:
        if change.seconds:
            for value, grown in change.growth(name, by, **labels).items():
                summed[value] += grown / change.seconds
    return summed


def rate(changes: Sequence[Change], name: str, **labels: str) -> float:
    """A counter's growth a second on all workers together."""
    return sum(rates(changes, name, "", **labels).values())


def total(changes: Sequence[Change], name: str, **labels: str) -> float:
    """The newest values of all workers together."""
    return sum(change.new.total(name, **labels) for change in changes)


def ratio(part: float, whole: float) -> float | None:
    """`part / whole`, None where there is no whole."""
    return part / whole if whole else None


def mean(changes: Sequence[Change], name: str, **labels: str) -> float | None:
    """The mean of a summary or histogram over what came; None: nothing did."""
    return ratio(
        sum(growth(changes, f"{name}_sum", **labels).values()), sum(growth(changes, f"{name}_count", **labels).values())
    )


def quantile(changes: Sequence[Change], name: str, q: float) -> float | None:
    """A histogram's quantile over what came, linear between the bounds of a bucket, as Prometheus does it."""
    counts = growth(changes, f"{name}_bucket", by="le")
    buckets = sorted((float(bound), count) for bound, count in counts.items())
    if not buckets or not buckets[-1][1]:
        return None
    wanted = q * buckets[-1][1]
    for (low, below), (high, reached) in pairwise([(0.0, 0.0), *buckets]):
        if reached >= wanted:
            return low if high == float("inf") else low + (high - low) * (wanted - below) / (reached - below)
    return buckets[-1][0]
