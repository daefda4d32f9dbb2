"""What an engine process is told at its start, and which GPU it sees."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Final

import msgspec

from loramux_worker.engine.protocol import AdapterReference
from loramux_worker.scheduler.policy import AdapterPolicy

# A step of so many prompt tokens takes some tens of milliseconds, for which everybody's next token waits.
STEP_TOKENS: Final = 2048
CPU_PROMPT_TOKENS: Final = 192  # beside a token of every sequence: of a crowd that comes at once, some in each step


class EngineConfig(msgspec.Struct, frozen=True):
    """Settings of one engine. Memory is in bytes; None means: from what is free."""

    model: str
    model_name: str | None = None  # None: from the path, where it is a hub id
    device: str = "auto"  # auto, cpu, cuda, cuda:1 …
    dtype: str = "auto"  # auto, float32, float16, bfloat16
    block_size: int = 16
    max_model_len: int | None = None  # None: from the model
    max_batched_tokens: int | None = None  # None: as `step_tokens` says
    max_batch_sequences: int = 256
    max_batch_ranks: int = 4096
    locality: float = 0.0
    residency_quantum: float = 8192.0
    policies: tuple[AdapterPolicy, ...] = ()
    max_lora_rank: int = 256
    merge_adapter: AdapterReference | None = None  # its files stay where they are as long as the engine runs
    kv_cache_memory: int | None = None
    adapter_memory: int | None = None
    host_memory: int | None = None
    cuda_graphs: bool = True
    threads: int | None = None  # of a step on a CPU; None: as many as torch takes, OMP_NUM_THREADS or all cores
    log_format: str = "text"
    log_level: str = "info"

    def step_tokens(self, device_type: str) -> int:
        """Tokens of one step at most, on a device of this type."""
        if self.max_batched_tokens is not None:
            return self.max_batched_tokens
        return self.max_batch_sequences + CPU_PROMPT_TOKENS if device_type == "cpu" else STEP_TOKENS


def confine(config: EngineConfig, environment: Mapping[str, str]) -> tuple[EngineConfig, dict[str, str]]:
    """The config and the environment of a process that sees its own GPU alone.

    Launches, streams, events and pinned memory all follow the current device of their thread: with one device to see,
    there is no other for any of them.
    """
    kind, _, number = config.device.partition(":")
    if kind != "cuda" or not number.isdigit():
        return config, dict(environment)
    visible = [name.strip() for name in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    chosen = "".join(visible[int(number) :][:1]) if visible else number
    return msgspec.structs.replace(config, device="cuda"), {**environment, "CUDA_VISIBLE_DEVICES": chosen}


def step_threads(devices: Sequence[str], cores: int, environment: Mapping[str, str]) -> int | None:
    """Threads of each of some engines on a CPU: one core is the front's, and they divide the rest.

    Threads meet at the end of every product. Where one of them has lost its core to somebody else, the others wait for
    it, and burn theirs. None, what torch takes: on GPUs, and where somebody has said otherwise.
    """
    if "OMP_NUM_THREADS" in environment or any(device.startswith("cuda") for device in devices):
        return None
    return max(1, (cores - 1) // len(devices))


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
