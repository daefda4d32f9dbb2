"""Seats are kept for adapters that have few, while such come."""

from __future__ import annotations

from scheduler_support import FakeEngine

from loramux_worker.scheduler.config import SchedulerConfig
from loramux_worker.scheduler.kept_seats import KeptSeats

CONFIG = SchedulerConfig(max_model_len=100, max_batched_tokens=512, max_batch_sequences=64)


def flooded(light_every: int | None) -> tuple[FakeEngine, list[int]]:
    """An adapter that always has sequences of one length waiting, beside some that ask now and then."""
    engine = FakeEngine(CONFIG, num_blocks=4096)
    waits: list[int] = []
    waiting: dict[int, int] = {}
    for number in range(600):
        while engine.scheduler.num_waiting < 100:
            engine.add("heavy", prompt=8, new=16)
        if light_every is not None and not number % light_every:
            waiting[engine.add(f"light-{number % 20}", prompt=8, new=16).sequence_id] = number
        chunks = engine.step().chunks
        for chunk in chunks:
            asked = waiting.pop(chunk.sequence.sequence_id, None)
            if asked is not None:
                waits.append(number - asked)
    return engine, waits


def test_whoever_asks_now_and_then_finds_a_seat_at_once() -> None:
    _, waits = flooded(light_every=1)
    assert len(waits) == 600
    late = waits[100:]
    assert sum(wait > 0 for wait in late) <= len(late) // 100
    assert max(late) <= 4  # of the 16 that a wave takes


def test_an_adapter_that_is_alone_has_every_seat() -> None:
    engine, _ = flooded(light_every=None)
    assert engine.scheduler.num_running == 64


def test_nothing_is_kept_when_nobody_has_come_for_a_while() -> None:
    kept = KeptSeats(64)
    for _ in range(200):
        kept.tick()
        kept.taken(0, 20)
    assert kept.number == 2
    assert not kept.may_take(40, 20, free=2, waiting=9)
    assert kept.may_take(3, 20, free=2, waiting=9)
    assert kept.may_take(40, 20, free=3, waiting=9)
    assert kept.may_take(40, 20, free=2, waiting=2)
    for _ in range(300):
        kept.tick()
        kept.taken(40, 20)  # has more than its share
    assert kept.number == 0


def test_a_small_batch_keeps_none() -> None:
    kept = KeptSeats(7)
    for _ in range(100):
        kept.tick()
        kept.taken(0, 20)
    assert kept.number == 0
