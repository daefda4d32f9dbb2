"""Engines of one worker, each on a GPU of its own."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from loramux_worker.engine.config import EngineConfig
from loramux_worker.engine.protocol import AdapterReference, SamplingParameters
from loramux_worker.generation import Generation
from loramux_worker.pool import EnginePool
from tiny_models import Reference, make_model

_ADAPTER_MEMORY = 256 << 20


async def _finished(generation: Generation) -> list[int]:
    while not generation.is_done:
        await generation.wait_beyond(len(generation.token_ids))
    return generation.token_ids


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
async def test_every_engine_computes_on_its_own_gpu(tmp_path: Path) -> None:
    model = make_model(tmp_path, "llama")
    configs = [
        EngineConfig(
            model=str(model.path),
            device=f"cuda:{index}",
            dtype="float32",
            max_batch_sequences=16,
            max_batched_tokens=64,
            adapter_memory=_ADAPTER_MEMORY,
        )
        for index in range(2)
    ]
    before = [torch.cuda.mem_get_info(index)[0] for index in range(2)]
    pool = EnginePool(configs)
    try:
        await pool.start()
        taken = [free - torch.cuda.mem_get_info(index)[0] for index, free in enumerate(before)]
        assert min(taken) > _ADAPTER_MEMORY, "both hold a pool"
        prompt, adapter_id = [1, 7, 3, 9, 200, 4], model.adapter_ids[0]
        adapter = AdapterReference(adapter_id, "sha256:0", str(model.adapters / adapter_id))
        sampling = SamplingParameters(12, ignore_eos=True)
        requests = [adapter, None] * 8  # those of the base model go to whichever engine has less to do
        answers = await asyncio.gather(*(_finished(pool.submit(prompt, sampling, wanted)) for wanted in requests))
    finally:
        await pool.close()
    reference = Reference(model)
    for wanted, tokens in zip(requests, answers, strict=True):
        expected = reference.generate(prompt, None if wanted is None else adapter_id, 12)
        assert tokens[: len(expected)] == expected
