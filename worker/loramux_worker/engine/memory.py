"""How an engine divides its memory: KV cache, adapters on the device, adapters on the host."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from loramux_worker.engine.config import EngineConfig
from loramux_worker.errors import ConfigurationError
from loramux_worker.model.loader import ServedModel

GIB = 1 << 30

# shares of what is free on a GPU once the weights are loaded and a step has its room
_GPU_KV_SHARE, _GPU_ADAPTER_SHARE = 0.78, 0.22
_LIBRARIES = GIB // 2  # CUDA graphs, workspaces of the vendor's libraries, compiled kernels
_LOGITS_COPIES = 7  # float32 each: the logits, what filters and penalties make of them, counts of used tokens
_CPU_SHARE, _CPU_MOST = 0.10, 1 * GIB  # a laptop is used for other things too
_HOST_SHARE = 0.25


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Sizes in their own units: blocks of the KV cache, bytes of the two adapter tiers in memory."""

    num_blocks: int
    adapter_bytes: int
    host_bytes: int


def plan_memory(config: EngineConfig, model: ServedModel, max_model_len: int) -> MemoryPlan:
    """What the settings say, and for the rest a share of what is free.

    Raises:
        ConfigurationError: the KV cache would not hold one sequence of `max_model_len` tokens.
    """
    free_host = available_host_memory()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()  # packing the weights left pieces behind that nothing else fits into
        free = torch.cuda.mem_get_info(model.device)[0] - step_memory(config, model)
        if free <= 0:
            raise ConfigurationError(
                f"--max-batched-tokens {config.step_tokens(model.device.type)}: a step does not fit into what the "
                "weights leave of the GPU; say fewer, or fewer --max-batch-sequences"
            )
        kv, adapters = int(free * _GPU_KV_SHARE), int(free * _GPU_ADAPTER_SHARE)
    else:
        kv = adapters = min(int(free_host * _CPU_SHARE), _CPU_MOST)
    block_bytes = config.block_size * model.kv_bytes_per_token
    most_useful = config.max_batch_sequences * -(-max_model_len // config.block_size)
    if config.kv_cache_memory is None:
        num_blocks = min(kv // block_bytes, most_useful)
    else:
        num_blocks = config.kv_cache_memory // block_bytes
    if num_blocks * config.block_size < max_model_len:
        raise ConfigurationError(
            f"--kv-cache-memory: {num_blocks} blocks of {config.block_size} tokens do not hold one sequence of "
            f"--max-model-len {max_model_len}; it takes {-(-max_model_len // config.block_size) * block_bytes} bytes"
        )
    host = min(int(free_host * _HOST_SHARE), 64 * GIB) if model.device.type == "cuda" else adapters
    return MemoryPlan(
        num_blocks=num_blocks,
        adapter_bytes=adapters if config.adapter_memory is None else config.adapter_memory,
        host_bytes=host if config.host_memory is None else config.host_memory,
    )


def step_memory(config: EngineConfig, model: ServedModel) -> int:
    """Bytes that the largest step takes on a GPU beside weights, cache and adapters; rather too many than too few."""
    sequences = config.max_batch_sequences
    tokens = max(config.step_tokens(model.device.type), sequences)
    layers = [t for i, t in enumerate(model.targets) if i not in model.edge_targets]
    outputs = sum(t.out_features for t in layers) // model.num_layers  # of one layer, as if all were held at once
    hidden = model.targets[model.embedding_target].out_features
    activations = tokens * (2 * outputs + 4 * hidden) * model.dtype.itemsize
    return activations + _LOGITS_COPIES * 4 * sequences * model.vocab_size + _LIBRARIES


def available_host_memory() -> int:
    """Bytes of memory that can be had without swapping."""
    try:
        with open("/proc/meminfo") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
