"""Where the milliseconds of one request went."""

from __future__ import annotations

import time
from typing import NamedTuple

from loramux_schemas import Timing
from loramux_worker.engine.protocol import SequenceTiming


class Stage(NamedTuple):
    """A stretch of a request's way, in Unix time."""

    name: str
    began: float
    ended: float


class Stopwatch:
    """Starts when a request is taken from Kafka; `timestamp_ms` is the record's own Unix time."""

    def __init__(self, timestamp_ms: int) -> None:
        self._started = time.monotonic()
        self._in_kafka = max(0.0, time.time() - timestamp_ms / 1000)
        self._prepared: float | None = None
        self._answered: float | None = None
        self._engine: SequenceTiming | None = None

    def prepared(self) -> None:
        """The prompt is tokenised and the adapter's files are on the disk."""
        self._prepared = time.monotonic()

    def seconds_until(self, deadline_ms: int | None) -> float | None:
        """Seconds left; negative when the deadline has passed, None without one."""
        return None if deadline_ms is None else deadline_ms / 1000 - time.time()

    def timing(self, engine: SequenceTiming | None) -> Timing:
        """The reply's `timing`: the queue counts from Kafka's timestamp on, the adapter from store to memory."""
        self._answered, self._engine = time.monotonic(), engine
        elapsed = self._answered - self._started
        preparing = (self._prepared or self._started) - self._started
        total = self._in_kafka + elapsed
        if engine is None:
            return Timing(queue_ms=_ms(self._in_kafka), adapter_ms=_ms(preparing), total_ms=_ms(total))
        return Timing(
            queue_ms=_ms(self._in_kafka + engine.queue),
            adapter_ms=_ms(preparing + engine.adapter),
            prefill_ms=_ms(engine.prefill),
            decode_ms=_ms(engine.decode),
            total_ms=_ms(total),
        )

    def stages(self) -> tuple[Stage, ...]:
        """The whole way until now, after `timing`: from Kafka's timestamp to what was sent."""
        now = time.monotonic()
        answered = self._answered or now
        prepared = self._prepared or answered
        ends = [("kafka.queue", self._started), ("prepare", prepared)]
        if self._engine is not None:
            at = prepared
            for name in ("adapter", "queue", "prefill", "decode"):
                at = min(answered, at + getattr(self._engine, name))
                ends.append((f"engine.{name}", at))
        ends += [("answer", answered), ("publish", now)]
        stages, at, to_unix = [], self._started - self._in_kafka, time.time() - now
        for name, end in ends:
            stages.append(Stage(name, at + to_unix, end + to_unix))
            at = end
        return tuple(stages)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
