"""The report of a run: a table for a person, one JSON document for a machine."""

from __future__ import annotations

import statistics
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.machine import describe_machine
from chaos.checker import Verdict
from chaos.schedule import Wound


@dataclass
class Report:
    """What a run was asked for, what was done to it and what came out."""

    settings: dict[str, Any]
    wounds: list[Wound]
    skipped: dict[str, str]
    verdict: Verdict
    seconds: float
    complaints: list[str]

    def to_markdown(self) -> str:
        """Faults by kind, then the counts."""
        rows = [
            "| fault | times | unanswered when it struck | recovered after, p50 | max |",
            "| --- | --- | --- | --- | --- |",
        ]
        for kind, wounds in sorted(self._by_kind().items()):
            rows.append(self._row(kind, wounds))
        rows.append(self._row("**all**", self.wounds))
        v = self.verdict
        telling = v.telling / max(1, v.replies)
        streams = f"{v.streams_whole} whole, {v.streams_begun_anew} of all begun anew by another worker, "
        counts = {
            "requests": v.sent,
            "final replies": v.replies,
            "lost": v.lost,
            "duplicates": v.duplicates,
            "wrong adapter": v.wrong_adapter,
            "wrong tokens": v.wrong_tokens,
            "errors": ", ".join(f"{n} {code}" for code, n in sorted(v.errors.items())) or 0,
            "dead letters": v.dead_letters,
            "replies whose tokens only the right adapter gives": f"{telling:.1%}",
            "streams": streams
            + f"{v.streams_short} cut short, {v.streams_with_gap} with a gap, {v.streams_wrong} wrong",
            "duration": f"{self.seconds:.0f} s",
        }
        rows += ["", "| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in counts.items())]
        return "\n".join(rows)

    def to_json(self) -> dict[str, Any]:
        """Everything, with the machine and versions."""
        return {
            "benchmark": "chaos",
            "machine": describe_machine(),
            "settings": self.settings,
            "figures": {
                "seconds": self.seconds,
                "faults": [asdict(wound) for wound in self.wounds],
                "recovery": {kind: _times(wounds) for kind, wounds in sorted(self._by_kind().items())},
                "recovery_all": _times(self.wounds),
                "skipped": self.skipped,
                "verdict": asdict(self.verdict),
            },
            "complaints": self.complaints,
        }

    def _by_kind(self) -> dict[str, list[Wound]]:
        kinds: dict[str, list[Wound]] = defaultdict(list)
        for wound in self.wounds:
            kinds[wound.kind].append(wound)
        return kinds

    def _row(self, kind: str, wounds: list[Wound]) -> str:
        if not wounds:
            return f"| {kind} | 0 | | | |"
        unanswered = statistics.median(wound.in_flight for wound in wounds)
        times = _times(wounds)
        return f"| {kind} | {len(wounds)} | {unanswered:.0f} | {times['p50']:.1f} s | {times['max']:.1f} s |"


def _times(wounds: list[Wound]) -> dict[str, float]:
    seconds = [wound.seconds for wound in wounds]
    return {"p50": statistics.median(seconds), "max": max(seconds)} if seconds else {}
