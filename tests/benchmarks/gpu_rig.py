"""A whole engine over a model of true shape and random weights, made on the spot: for benchmarks on a GPU."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from loramux_worker.adapters.gpu_pool import AdapterPool
from loramux_worker.adapters.host import AdapterKey, HostAdapter
from loramux_worker.adapters.host_memory import allocate
from loramux_worker.adapters.layout import AdapterLayout
from loramux_worker.engine.build import EngineParts, assemble
from loramux_worker.engine.config import EngineConfig
from loramux_worker.engine.protocol import (
    AdapterMoved,
    AdapterReference,
    EngineMessage,
    Failed,
    Outputs,
    SamplingParameters,
    Submit,
)
from loramux_worker.model.attention import IMPLEMENTATION
from loramux_worker.model.loader import ServedModel, prepare_model

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {  # Llama 3.1 8B
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    },
    "1b": {  # TinyLlama 1.1B
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 2048,
    },
    "tiny": {  # for a quick look without a GPU
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 1024,
        "max_position_embeddings": 2048,
    },
}

ALL_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def random_model(
    shape: str, *, device: str = "cuda", dtype: torch.dtype = torch.bfloat16, layers: int | None = None
) -> ServedModel:
    """A model of that shape with random weights, ready to be served."""
    settings = SHAPES[shape] | ({} if layers is None else {"num_hidden_layers": layers})
    config = LlamaConfig(**settings, tie_word_embeddings=False)
    torch.manual_seed(0)
    with torch.device(device):
        module = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=IMPLEMENTATION)
    return prepare_model(module, torch.device(device), name=f"random-{shape}")


def adapter_layout(model: ServedModel, rank: int, modules: Sequence[str] = ALL_LINEARS) -> AdapterLayout:
    """An adapter of one rank on some of each layer's modules."""
    chosen = [(i, rank) for i, t in enumerate(model.targets) if t.name.rpartition(".")[2] in modules]
    return AdapterLayout.plan(chosen, model.targets)


@dataclass(frozen=True)
class Rig:
    """An engine, and what it has said."""

    model: ServedModel
    parts: EngineParts
    outputs: list[Outputs]
    moves: list[AdapterMoved]

    @classmethod
    def make(cls, model: ServedModel, **settings: Any) -> Rig:
        """An engine of its own over the model."""
        outputs: list[Outputs] = []
        moves: list[AdapterMoved] = []

        def emit(message: EngineMessage) -> None:
            match message:
                case Outputs():
                    outputs.append(message)
                case AdapterMoved():
                    moves.append(message)
                case Failed():
                    raise AssertionError(message)

        return cls(model, assemble(EngineConfig(model="random", **settings), model, emit), outputs, moves)

    @property
    def on_gpu(self) -> bool:
        """Whether the engine's device is a GPU."""
        return self.model.device.type == "cuda"

    def load_adapters(
        self, ranks: Iterable[int], modules: Sequence[str] = ALL_LINEARS, prefix: str = "adapter"
    ) -> list[AdapterReference]:
        """Random adapters straight into the pool, one for each rank given."""
        pool = self.parts.adapters.pool
        runs: dict[int, HostAdapter] = {}
        references = []
        for i, rank in enumerate(ranks):
            if rank not in runs:
                layout = adapter_layout(self.model, rank, modules)
                run = allocate(layout.num_elements, self.model.dtype, pin=self.on_gpu)
                run.copy_(torch.randn(layout.num_elements, device=self.model.device).mul_(0.01).to(self.model.dtype))
                runs[rank] = HostAdapter(("", ""), layout, run)
            key: AdapterKey = (f"{prefix}-{i}", "sha256:0")
            loaded = pool.load(HostAdapter(key, runs[rank].layout, runs[rank].run))
            assert loaded is not None, "--adapter-memory is too small"
            references.append(AdapterReference(*key, path="/nowhere"))
        if self.on_gpu:
            torch.cuda.synchronize()
        return references

    def evict_adapters(self) -> None:
        """Empty pool and host tier; nothing may be running."""
        pool, host = self.parts.adapters.pool, self.parts.adapters.host
        for key in list(pool.keys()):
            pool.evict(key)
            host.drop(key)

    def submit(self, count: int, prompt: int, new: int, adapters: Sequence[AdapterReference | None]) -> None:
        """Greedy requests that run to their length; adapters are taken in turn."""
        generator = torch.Generator().manual_seed(len(self.outputs))
        for i in range(count):
            ids = torch.randint(self.model.vocab_size, (prompt,), generator=generator).tolist()
            adapter = adapters[i % len(adapters)] if adapters else None
            sampling = SamplingParameters(new, ignore_eos=True)
            Rig.last_id += 1
            self.parts.engine.handle(Submit(Rig.last_id, ids, sampling, adapter))

    last_id: ClassVar[int] = 0
    """Of the sequence that came last."""

    def drain(self, most_steps: int = 1 << 30) -> list[float]:
        """Step until nothing is left; seconds of each step."""
        engine, seconds = self.parts.engine, []
        last = time.perf_counter()
        while engine.has_work and len(seconds) < most_steps:
            if not engine.step():
                time.sleep(0.001)  # as an engine process does: adapters are on their way, in threads
                continue
            now = time.perf_counter()
            seconds.append(now - last)
            last = now
        self.outputs.clear()
        return seconds


def pool_memory(model: ServedModel, count: int, rank: int, modules: Sequence[str]) -> dict[str, Any]:
    """What the device gives away for `count` resident adapters, tables and staging included, and their own bytes."""
    layout = adapter_layout(model, rank, modules)
    targets = [model.targets[module.target] for module in layout.modules]
    own = count * sum(rank * (t.in_features + t.out_features) for t in targets) * model.dtype.itemsize
    adapter = allocate(layout.num_elements, model.dtype, pin=True).normal_()
    torch.cuda.empty_cache()
    before, _ = torch.cuda.mem_get_info()
    pool = AdapterPool(count * layout.num_elements, len(model.targets), 4096, model.device, model.dtype)
    for i in range(count):
        assert pool.load(HostAdapter((f"resident-{i}", "sha256:0"), layout, adapter)) is not None, "there is no room"
    torch.cuda.synchronize()
    assert pool.num_adapters == count
    taken = before - torch.cuda.mem_get_info()[0]
    return {"adapters": count, "rank": rank, "bytes": taken, "own_bytes": own, "ratio": round(taken / own, 4)}


def write_adapter(folder: Path, model: ServedModel, rank: int, modules: Sequence[str] = ALL_LINEARS) -> Path:
    """A random adapter as PEFT saves it, in the model's dtype."""
    chosen = {
        target.name: (target.in_features, target.out_features)
        for target in model.targets
        if target.name.rpartition(".")[2] in modules
    }
    return save_lora(folder, chosen, rank, model.dtype, model.device)


def save_lora(
    folder: Path, linears: Mapping[str, tuple[int, int]], rank: int, dtype: torch.dtype, device: torch.device
) -> Path:
    """A random adapter as PEFT saves it; `linears` are (in, out) features by name."""
    tensors = {}
    for name, (num_in, num_out) in linears.items():
        for part, shape in (("A", (rank, num_in)), ("B", (num_out, rank))):
            values = torch.randn(shape, device=device).mul_(0.01).to(dtype).cpu()
            tensors[f"base_model.model.{name}.lora_{part}.weight"] = values
    folder.mkdir(parents=True, exist_ok=True)
    modules = sorted({name.rpartition(".")[2] for name in linears})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "bias": "none", "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def median_of_replays(replay: Any, count: int = 20) -> float:
    """Median seconds of what `replay` enqueues, by events."""
    times = []
    for _ in range(3):
        replay()
    for _ in range(count):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def copy_bandwidth() -> float:
    """Bytes per second, read and written, of a large copy on the device."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda").random_(-100, 100)
    target = torch.empty_like(source)
    return 2 * source.numel() / median_of_replays(lambda: target.copy_(source))
