"""An engine and its parts, put together from its settings."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import structlog
import torch

from loramux_worker.adapters.adapter_plan import AdapterLimits
from loramux_worker.adapters.base_weights import BaseWeights, parameter_shapes, replaceable_parameters
from loramux_worker.adapters.gpu_pool import AdapterPool
from loramux_worker.adapters.host import HostTier
from loramux_worker.adapters.residency import AdapterResidency
from loramux_worker.engine.config import EngineConfig
from loramux_worker.engine.engine import Engine
from loramux_worker.engine.kv_cache import BlockPool
from loramux_worker.engine.memory import plan_memory
from loramux_worker.engine.protocol import PROTOCOL_VERSION, EngineMessage, Ready, Stats
from loramux_worker.engine.runner import Runner
from loramux_worker.errors import ConfigurationError
from loramux_worker.model.loader import ServedModel, load_model
from loramux_worker.model.merge_in_place import merge_in_place
from loramux_worker.model.self_check import check_model
from loramux_worker.scheduler.policy import Policies
from loramux_worker.scheduler.scheduler import Scheduler, SchedulerConfig

log = structlog.get_logger(__name__)

_MAX_RESIDENT = 4096  # rows of the pool's tables: adapters on the device at once


@dataclass(frozen=True, slots=True)
class EngineParts:
    """The engine, and the parts whose figures are reported."""

    engine: Engine
    runner: Runner
    scheduler: Scheduler
    blocks: BlockPool
    adapters: AdapterResidency
    ready: Ready

    def stats(self) -> Stats:
        """A picture of the moment."""
        host, pool = self.adapters.host, self.adapters.pool
        return Stats(
            running=self.scheduler.num_running,
            waiting=self.scheduler.num_waiting,
            kv_blocks_used=self.blocks.num_used,
            kv_blocks=self.blocks.num_blocks,
            preemptions_total=self.engine.preemptions_total,
            steps_total=self.engine.steps_total,
            step_seconds_total=self.engine.step_seconds_total,
            batch_sequences=self.engine.batch_sequences,
            batch_adapters=self.engine.batch_adapters,
            host_adapters=host.num_adapters,
            host_bytes=host.bytes_used,
            gpu_adapters=self.adapters.num_in_pool,
            gpu_bytes=pool.bytes_used,
            host_evictions_total=host.evictions_total,
            gpu_evictions_total=pool.evictions_total,
            host_hits_total=host.hits_total,
            host_misses_total=host.misses_total,
            gpu_hits_total=pool.hits_total,
            gpu_misses_total=pool.misses_total,
            batch_ranks=self.scheduler.batch_ranks,
            host_capacity_bytes=host.capacity_bytes,
            gpu_capacity_bytes=pool.capacity_elements * pool.elements.itemsize,
            adapters=self.scheduler.adapter_stats(),
        )


def build_engine(
    config: EngineConfig, emit: Callable[[EngineMessage], None], *, pipeline_depth: int | None = None
) -> EngineParts:
    """Load the model, check it, and put an engine together around it, see `assemble`.

    Raises:
        ConfigurationError: these settings, or this model, cannot be served.
    """
    model = load_model(config.model, config.device, config.dtype)
    log.info("model_loaded", model=model.name, device=str(model.device))
    check_model(model)
    return assemble(config, model, emit, pipeline_depth=pipeline_depth)


def assemble(
    config: EngineConfig,
    model: ServedModel,
    emit: Callable[[EngineMessage], None],
    *,
    pipeline_depth: int | None = None,
) -> EngineParts:
    """Merge an adapter if asked, divide the memory and make the parts; `emit` takes what the front is to hear.

    `pipeline_depth`, see `Engine`, follows from the device unless a test wants another.

    Raises:
        ConfigurationError: these settings cannot be served.
    """
    on_gpu = model.device.type == "cuda"
    if on_gpu and config.block_size & (config.block_size - 1):
        raise ConfigurationError(f"--block-size {config.block_size}: on a GPU it is a power of two, such as 16")
    max_model_len = _context_length(config, model)
    adapter_limits = _adapter_limits(config, model)
    correction = adapter_limits.correction
    correction_rank = 0 if correction is None else correction.rank
    memory = plan_memory(config, model, max_model_len)
    blocks = BlockPool(memory.num_blocks, config.block_size)
    pool = AdapterPool(
        capacity_elements=memory.adapter_bytes // model.dtype.itemsize,
        num_targets=len(model.targets),
        max_slots=_MAX_RESIDENT,
        device=model.device,
        dtype=model.dtype,
    )
    host = HostTier(
        memory.host_bytes,
        model.targets,
        adapter_limits,
        pin=on_gpu,
        max_loads=4 if (os.cpu_count() or 1) < 16 else 5,  # more load faster, and the steps pay for it
    )
    adapters = AdapterResidency(host, pool, on_move=emit, correction=correction)
    limits = SchedulerConfig(
        max_model_len=max_model_len,
        max_batched_tokens=config.step_tokens(model.device.type),
        max_batch_sequences=config.max_batch_sequences,
        max_batch_ranks=max(1, config.max_batch_ranks - correction_rank),  # the base model may be in any batch
        locality=config.locality,
        residency_quantum=config.residency_quantum,
    )
    scheduler = Scheduler(limits, blocks, adapters, Policies(config.policies))
    max_rank = config.max_lora_rank + correction_rank
    runner = Runner(model, adapters, memory.num_blocks, config.block_size, limits, max_rank)
    if on_gpu and config.cuda_graphs:
        try:
            runner.capture_graphs()
        except torch.OutOfMemoryError as error:
            raise ConfigurationError(
                f"--kv-cache-memory {memory.num_blocks * config.block_size * model.kv_bytes_per_token} with "
                f"--adapter-memory {memory.adapter_bytes}: the largest step does not fit beside them; say less"
            ) from error
        except RuntimeError as error:  # a model's own code may wait for the device, or memory may have run out
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigurationError(
                f"--cuda-graphs: this model's steps cannot be captured ({reason}); say --no-cuda-graphs"
            ) from error
    depth = int(on_gpu) if pipeline_depth is None else pipeline_depth
    engine = Engine(scheduler, runner, adapters, max_model_len, emit, pipeline_depth=depth)
    ready = Ready(
        protocol_version=PROTOCOL_VERSION,
        max_model_len=max_model_len,
        vocab_size=model.vocab_size,
        num_blocks=memory.num_blocks,
        block_size=config.block_size,
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
    )
    return EngineParts(engine, runner, scheduler, blocks, adapters, ready)


def _adapter_limits(config: EngineConfig, model: ServedModel) -> AdapterLimits:
    """What adapters may be; `config.merge_adapter` is merged into the model here."""
    limits = AdapterLimits(
        max_rank=config.max_lora_rank,
        dtype=model.dtype,
        base_model_name=config.model_name or model.name,
        base_weights=BaseWeights.of_model(model.module),
        parameters=parameter_shapes(model.module),
        replaceable=replaceable_parameters(model.module, model.targets),
    )
    if config.merge_adapter is None:
        return limits
    correction = merge_in_place(model, config.merge_adapter, limits)
    adapter_id, revision = correction.key
    log.info("adapter_merged", adapter_id=adapter_id, revision=revision, modules=len(correction.layout.modules))
    return replace(limits, correction=correction)


def _context_length(config: EngineConfig, model: ServedModel) -> int:
    asked = config.max_model_len
    if asked is not None and asked > model.max_position:
        raise ConfigurationError(f"--max-model-len {asked}: the model is right up to {model.max_position} tokens")
    return asked or model.max_position
