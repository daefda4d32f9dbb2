"""Sequences that begin together beside others that decode: their adapters in the host tier, or in the pool already."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from gpu_rig import Rig

from loramux_worker.engine.protocol import AdapterReference, Cancel, Prefetch

PROMPT, NEW = 64, 1900
SETTLE, MEASURED = 60, 10  # steps
MOST_BEGIN = 32
ROUNDS = 9  # of which the first is not counted


def compare_begins(rig: Rig, resident: Sequence[AdapterReference], others: Sequence[AdapterReference]) -> list[Any]:
    """For 1, 4, 8, … new adapters at once: until all have their first token, and ten steps; both ways, in turn."""
    engine, pool, host = rig.parts.engine, rig.parts.adapters.pool, rig.parts.adapters.host
    for other in others:
        engine.handle(Prefetch(other))
    while any(host.get(other.key) is None for other in others):
        engine.step()
        time.sleep(0.001)
    rig.submit(len(resident), PROMPT, NEW, resident)
    for _ in range(SETTLE):
        engine.step()
    rows = []
    for count in [count for count in (1, 4, 8, 16, MOST_BEGIN) if count <= len(others)]:
        seconds: dict[bool, list[tuple[float, float]]] = {False: [], True: []}
        for number in range(ROUNDS):
            for ahead in (number % 2 == 0, number % 2 == 1):
                for other in others:
                    if pool.slot_of(other.key) is not None:
                        pool.evict(other.key)
                seconds[ahead].append(_begin(rig, others[:count], ahead))
        row: dict[str, float] = {"begin": count}
        for ahead, name in ((False, "in_host_tier"), (True, "in_pool")):
            first, steps = (statistics.median(values) * 1e3 for values in zip(*seconds[ahead][1:], strict=True))
            row |= {f"first_token_ms_{name}": round(first, 2), f"ten_steps_ms_{name}": round(steps, 2)}
        rows.append(row)
    for sequence_id in range(rig.last_id + 1):
        engine.handle(Cancel(sequence_id))
    rig.drain()
    for other in others:
        host.drop(other.key)
    rig.evict_adapters()
    return rows


def _begin(rig: Rig, others: Sequence[AdapterReference], ahead: bool) -> tuple[float, float]:
    """Seconds until each of the others' sequences has its first token, and of the steps from their coming on."""
    engine, pool, host = rig.parts.engine, rig.parts.adapters.pool, rig.parts.adapters.host
    if ahead:
        for other in others:
            adapter = host.get(other.key)
            assert adapter is not None
            assert pool.load(adapter) is not None, "there is room"
        if rig.on_gpu:
            torch.cuda.synchronize()
    for _ in range(6):
        engine.step()
    rig.outputs.clear()
    last = rig.last_id
    rig.submit(len(others), PROMPT, MEASURED, others)
    waiting = set(range(last + 1, rig.last_id + 1))
    began, first_token = time.perf_counter(), 0.0
    for _ in range(MEASURED):
        engine.step()
        waiting -= {output.sequence_id for said in rig.outputs for output in said.outputs}
        if not waiting and not first_token:
            first_token = time.perf_counter() - began
    assert first_token, "each has begun"
    seconds = time.perf_counter() - began
    for sequence_id in range(last + 1, rig.last_id + 1):
        engine.handle(Cancel(sequence_id))
    return first_token, seconds
