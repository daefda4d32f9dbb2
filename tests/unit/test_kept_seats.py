"""The last seats of a batch are for adapters that have few."""

from __future__ import annotations

from scheduler_support import FakeEngine

from loramux_worker.scheduler.config import SchedulerConfig

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


def test_a_flood_that_is_alone_leaves_one_seat_in_sixteen() -> None:
    engine, _ = flooded(light_every=None)
    assert engine.scheduler.num_running == 60


def test_all_seats_are_taken_when_there_is_one_for_each() -> None:
    engine = FakeEngine(CONFIG, num_blocks=4096)
    for _ in range(64):
        engine.add("alone", prompt=8, new=16)
    engine.step()
    assert engine.scheduler.num_running == 64


def test_who_has_less_than_a_share_gets_one_of_the_last_seats_again() -> None:
    engine = FakeEngine(CONFIG, num_blocks=4096)
    for _ in range(200):
        engine.add("heavy", prompt=8, new=60)
    engine.step()
    for expected in (61, 62, 63, 64):
        engine.add("light", prompt=8, new=60)
        engine.step()
        assert engine.scheduler.num_running == expected
