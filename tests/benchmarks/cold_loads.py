"""Steps of sequences that decode, with adapters of others coming in between them, and without."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from gpu_rig import Rig

from loramux_worker.engine.protocol import AdapterReference, Cancel, Prefetch

PROMPT, NEW = 64, 1900
SETTLE = 32  # steps after the prefill before anything is measured
LATE = 2  # steps until the last copy is over for sure: one waits for it, and the step after tells


class Steps(NamedTuple):
    """Decode steps one after the other."""

    seconds: float
    count: int
    slowest: float


def compare_steps(
    rig: Rig, resident: Sequence[AdapterReference], others: Sequence[Sequence[AdapterReference]], rounds: int
) -> dict[str, Any]:
    """A sequence for each resident adapter decodes: as long as the others take to come in, then that many steps again.

    `others` are sets that take turns, of which the host tier holds one. In the first round it is empty, and memory is
    to be had from the system and pinned; in those that follow every adapter takes the place of another.
    """
    decode(rig, resident, (), SETTLE)  # warm up
    rows = []
    for number in range(1 + rounds):
        coming = others[number % len(others)]
        loading = decode(rig, resident, coming, 0)
        quiet = decode(rig, resident, (), loading.count)
        rows.append(_compared(loading, quiet, len(resident), len(coming) * _bytes_of(rig, coming[0])))
        for other in coming:
            rig.parts.adapters.pool.evict(other.key)
    full = rows[1:]
    return {
        "loss_percent": round(statistics.median(row["loss_percent"] for row in full), 2),
        "empty_tier": rows[0],
        "full_tier": full,
    }


def decode(rig: Rig, resident: Sequence[AdapterReference], others: Sequence[AdapterReference], fewest: int) -> Steps:
    """Decode until the others are in the pool, and for `fewest` steps."""
    engine, pool, host = rig.parts.engine, rig.parts.adapters.pool, rig.parts.adapters.host
    rig.submit(len(resident), PROMPT, NEW, resident)
    first = rig.last_id - len(resident) + 1
    while sum(len(said.outputs) for said in rig.outputs) < SETTLE * len(resident):
        engine.step()
    rig.outputs.clear()
    rig.moves.clear()
    for other in others:
        engine.handle(Prefetch(other))
        host.want(other.key)  # as if a sequence waited for it
    seconds, loaded, late = [], 0, LATE
    began = last = time.perf_counter()
    while len(seconds) < fewest or loaded < len(others) or (others and late):
        assert len(seconds) < NEW - 2 * SETTLE, "the adapters take longer than the sequences: fewer --loads"
        engine.step()
        late -= loaded == len(others)
        for move in rig.moves:
            if move.tier == "host":
                adapter = host.get(move.adapter.key)
                assert adapter is not None
                assert pool.load(adapter) is not None, "there is room"
                host.unwant(move.adapter.key)
                loaded += 1
        rig.moves.clear()
        now = time.perf_counter()
        seconds.append(now - last)
        last = now
    steps = Steps(last - began, len(seconds), max(seconds))
    answered = sum(len(said.outputs) for said in rig.outputs)
    assert answered == len(seconds) * len(resident), "each step is a token of each sequence"
    for sequence_id in range(first, rig.last_id + 1):
        engine.handle(Cancel(sequence_id))
    rig.drain()
    return steps


def _compared(loading: Steps, quiet: Steps, sequences: int, num_bytes: int) -> dict[str, float]:
    assert loading.count == quiet.count
    return {
        "steps": loading.count,
        "load_seconds": round(loading.seconds, 3),
        "load_GB_s": round(num_bytes / loading.seconds / 1e9, 2),
        "tokens_per_s": round(loading.count * sequences / loading.seconds),
        "tokens_per_s_without": round(quiet.count * sequences / quiet.seconds),
        "loss_percent": round((1 - quiet.seconds / loading.seconds) * 100, 2),
        "slowest_step_ms": round(loading.slowest * 1e3, 2),
        "slowest_step_without_ms": round(quiet.slowest * 1e3, 2),
    }


def _bytes_of(rig: Rig, other: AdapterReference) -> int:
    adapter = rig.parts.adapters.host.get(other.key)
    assert adapter is not None
    return adapter.num_bytes
