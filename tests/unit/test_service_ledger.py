"""What is told of each adapter, beside what was computed."""

from __future__ import annotations

import random

import pytest

from loramux_worker.engine.protocol import AdapterStats
from loramux_worker.scheduler import AdapterPolicy, Policies, SchedulerConfig
from loramux_worker.scheduler.ledger import ServiceLedger
from unit.scheduler_support import FakeEngine, FakeTiers


def by_label(engine: FakeEngine) -> dict[str, AdapterStats]:
    rows = engine.scheduler.adapter_stats()
    assert len({row.adapter for row in rows}) == len(rows)
    return {row.adapter: row for row in rows}


def test_service_is_what_was_computed_whatever_happens() -> None:
    """Preemptions, cancels, weights, lifts, adapters that go and come back."""
    config = SchedulerConfig(max_model_len=40, max_batched_tokens=16, max_batch_sequences=6)
    policies = Policies([AdapterPolicy("b", weight=4.0)])
    engine = FakeEngine(config, num_blocks=14, tiers=FakeTiers(slots=3), policies=policies)
    draw = random.Random(1)
    for number in range(300):
        if draw.random() < 0.3:
            engine.add(draw.choice(["a", "b", "c", "d", None]), prompt=draw.randint(1, 20), new=draw.randint(1, 12))
        if draw.random() < 0.05 and engine.sequences:
            engine.scheduler.cancel(draw.choice(list(engine.sequences)))
        engine.step()
        if number % 50 == 0:
            rows = by_label(engine)
            for adapter_id, service in engine.services.items():
                assert rows[adapter_id or "base"].service_total == pytest.approx(service)
            assert sum(row.waiting for row in rows.values()) == engine.scheduler.num_waiting
            assert sum(row.running for row in rows.values()) == engine.scheduler.num_running
    engine.drain(1000)
    rows = by_label(engine)
    assert rows["other"] == AdapterStats("other", 0.0, 0.0, 0, 0, 0, 0.0)
    assert sum(row.started_total for row in rows.values()) == len(engine.started_at)
    assert engine.num_preemptions > 0


def test_queue_wait_and_deficit() -> None:
    engine = FakeEngine(SchedulerConfig(max_model_len=64, max_batch_sequences=1))
    for _ in range(3):
        engine.add("busy", prompt=4, new=4)
    engine.step()
    light = [engine.add("light", prompt=4, new=4) for _ in range(2)]
    for _ in range(3):
        engine.step()
    rows = by_label(engine)
    assert (rows["busy"].service_total, rows["busy"].running, rows["busy"].waiting) == (12.0, 0, 2)
    assert (rows["busy"].deficit, rows["light"].deficit) == (0.0, 6.0), "it was lifted to 6, where busy was"
    assert rows["light"].started_total == 0
    engine.step()
    rows = by_label(engine)
    assert engine.started_at[light[0].sequence_id] == 4
    assert (rows["light"].started_total, rows["light"].queue_seconds_total) == (1, 4.0)


def test_labels_are_bounded_and_nothing_is_lost() -> None:
    engine = FakeEngine(SchedulerConfig(max_model_len=64))
    ledger = ServiceLedger(engine.scheduler.queue, max_labels=5)
    engine.scheduler._ledger = engine.scheduler._admission._ledger = ledger
    draw = random.Random(2)
    for number in range(400):
        name = f"late-{draw.randrange(3)}" if number > 100 else f"adapter-{draw.randrange(40)}"
        engine.add(name, prompt=2, new=2)
        engine.step()
        if number % 20 == 0:
            assert len(engine.scheduler.adapter_stats()) <= 6
    engine.drain(100)
    rows = by_label(engine)
    assert {"late-0", "late-1", "late-2", "other"} <= rows.keys(), "who asks most has a label"
    assert sum(row.service_total for row in rows.values()) == pytest.approx(400 * 6)
    assert sum(row.started_total for row in rows.values()) == 400
