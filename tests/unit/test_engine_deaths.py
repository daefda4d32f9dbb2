"""Engines that die of a request: who goes on, who is given up."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import dying_engine
from dying_engine import DEADLY, ONCE
from loramux_schemas import ErrorCode
from loramux_worker.engine.config import EngineConfig
from loramux_worker.engine.protocol import SamplingParameters
from loramux_worker.errors import Poisonous
from loramux_worker.generation import Generation
from loramux_worker.pool import EnginePool


@pytest.fixture
async def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[EnginePool]:
    """A pool whose engine process is that of `dying_engine`."""
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} {dying_engine.__file__} "$3"\n')
    interpreter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(interpreter))
    pool = EnginePool([EngineConfig(model="none", device="cpu")])
    await pool.start()
    yield pool
    await pool.close()


async def finished(generation: Generation) -> list[int]:
    while not generation.is_done:
        await generation.wait_beyond(len(generation.token_ids))
    await generation.wait_beyond(-1)  # raises what it failed of, tokens or not
    return generation.token_ids


def submit(pool: EnginePool, *prompt: int) -> Generation:
    return pool.submit(list(prompt), SamplingParameters(max_new_tokens=20))


async def test_a_sequence_goes_on_in_the_next_engine_where_it_was(pool: EnginePool) -> None:
    assert await finished(submit(pool, ONCE, 8)) == list(range(20))
    assert pool.restarts == 1


async def test_who_was_only_there_is_answered(pool: EnginePool) -> None:
    poison = submit(pool, DEADLY, 5)
    others = [submit(pool, 100 + i) for i in range(20)]
    with pytest.raises(Poisonous):
        await finished(poison)
    for other in others:
        assert await finished(other) == list(range(20))
    assert pool.restarts == 3


async def test_a_sequence_that_kills_three_engines_is_given_up(pool: EnginePool) -> None:
    poison = submit(pool, DEADLY, 5)
    with pytest.raises(Poisonous, match="3 engines died") as failure:
        await finished(poison)
    assert failure.value.code is ErrorCode.INTERNAL
    assert poison.token_ids == list(range(5)), "each engine began where the last one ended"
    assert pool.restarts == 3
    assert await finished(submit(pool, 1)) == list(range(20)), "the fourth engine serves"
