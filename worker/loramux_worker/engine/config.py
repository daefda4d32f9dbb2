"""What an engine process is told at its start."""

from __future__ import annotations

import msgspec


class EngineConfig(msgspec.Struct, frozen=True):
    """Settings of one engine. Memory is in bytes; None means: from what is free."""

    model: str
    model_name: str | None = None  # None: from the path, where it is a hub id
    device: str = "auto"  # auto, cpu, cuda, cuda:1 …
    dtype: str = "auto"  # auto, float32, float16, bfloat16
    block_size: int = 16
    max_model_len: int | None = None  # None: from the model
    max_batched_tokens: int = 2048
    max_batch_sequences: int = 256
    max_batch_ranks: int = 4096
    max_lora_rank: int = 256
    kv_cache_memory: int | None = None
    adapter_memory: int | None = None
    host_memory: int | None = None
    cuda_graphs: bool = True
    log_format: str = "text"
    log_level: str = "info"
