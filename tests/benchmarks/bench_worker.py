"""A whole worker through real Kafka beside Hugging Face PEFT on the same machine, in the same run.

    make bench        or        python tests/benchmarks/bench_worker.py --requests 200

A random Llama of about 20 M parameters in float32, 32 adapters of rank 8 on all linears, 64-token prompts, 64 new
tokens. PEFT is measured in both ways that it offers: one request at a time with `set_adapter`, and `generate` over
batches of mixed `adapter_names`. The last line of standard output is one JSON document.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.machine import describe_machine
from loramux_producer import Client
from services.kafka import KafkaCluster
from services.worker import WorkerProcess
from tiny_models import save_tokenizer

VOCAB_SIZE = 8192
PROMPT_TOKENS = 64
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200, help="requests through loramux (default 200)")
    parser.add_argument("--adapters", type=int, default=32, help="adapters of rank 8 (default 32)")
    parser.add_argument("--new-tokens", type=int, default=64, help="tokens to generate a request (default 64)")
    parser.add_argument("--peft-one", type=int, default=30, help="requests for PEFT one at a time (default 30)")
    parser.add_argument("--peft-batch", type=int, default=32, help="rows of a PEFT batch (default 32)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loramux-bench-") as folder:
        say("making the model and its adapters")
        model, adapters = make_model(Path(folder), options.adapters)
        parameters = (model / "model.safetensors").stat().st_size // 4
        jobs = [(prompt_of(i), f"tenant/{i % options.adapters}") for i in range(options.requests)]
        ours = measure_loramux(model, adapters, jobs, options.new_tokens)
        reference = load_peft(model, adapters, options.adapters)
        one = measure_peft_one(reference, jobs[: options.peft_one], options.new_tokens)
        mixed = measure_peft_mixed(reference, jobs, options.new_tokens, options.peft_batch)
    figures = {
        "loramux": ours,
        "peft_one_at_a_time": one,
        "peft_mixed_batches": mixed,
        "times_peft_one_at_a_time": ours["tokens_per_second"] / one["tokens_per_second"],
        "times_peft_mixed_batches": ours["tokens_per_second"] / mixed["tokens_per_second"],
    }
    print_table(figures)
    settings = vars(options) | {
        "prompt_tokens": PROMPT_TOKENS,
        "dtype": "float32",
        "parameters": parameters,
    }
    print(json.dumps({"benchmark": "worker", "machine": describe_machine(), "settings": settings, "figures": figures}))


def make_model(folder: Path, num_adapters: int) -> tuple[Path, Path]:
    """A random model and its adapters on disk."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=1024,
        bos_token_id=256,
        eos_token_id=257,
        pad_token_id=257,
    )
    path = folder / "llama-20m"
    base = AutoModelForCausalLM.from_config(config)
    base.save_pretrained(path)
    save_tokenizer(path, VOCAB_SIZE)
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS, init_lora_weights=False, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, lora)
    for i in range(num_adapters):
        torch.manual_seed(i)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        model.save_pretrained(folder / "adapters" / "tenant" / str(i))
    return path, folder / "adapters"


def prompt_of(i: int) -> str:
    """64 characters, which are 64 tokens of the byte-level tokenizer."""
    return f"request {i:04d}: ".ljust(PROMPT_TOKENS, "abcdefghij"[i % 10])


def measure_loramux(model: Path, adapters: Path, jobs: list[tuple[str, str]], new_tokens: int) -> dict[str, Any]:
    """All requests at once through Kafka and one worker."""
    say("starting Kafka and a worker")
    with KafkaCluster() as kafka:
        for topic in ("lora.requests", "lora.replies", "lora.stream", "lora.dead-letters", "lora.control"):
            kafka.create_topic(topic, partitions=4)
        with WorkerProcess(
            kafka.bootstrap_servers, model, adapter_uri=f"file://{adapters}/{{adapter_id}}", max_model_len=256
        ) as worker:
            say(f"loramux: {len(jobs)} requests")
            return asyncio.run(_drive(kafka.bootstrap_servers, worker, jobs, new_tokens))


async def _drive(servers: str, worker: WorkerProcess, jobs: list[tuple[str, str]], new_tokens: int) -> dict[str, Any]:
    async with Client(bootstrap_servers=servers, timeout=600) as client:

        async def ask(prompt: str, adapter_id: str) -> tuple[float, int]:
            begun = time.perf_counter()
            reply = await client.generate(prompt, adapter_id=adapter_id, max_new_tokens=new_tokens, ignore_eos=True)
            assert reply.usage is not None
            return time.perf_counter() - begun, reply.usage.completion_tokens

        await asyncio.gather(*(ask(*job) for job in jobs[:8]))  # warm-up: code paths, not adapters
        alone = [(await ask(*job))[0] for job in jobs[:5]]
        before = (
            worker.metric("loramux_step_seconds_sum"),
            worker.metric("loramux_step_seconds_count"),
            cpu_seconds(worker.server.pid),
        )
        begun = time.perf_counter()
        answers = await asyncio.gather(*(ask(*job) for job in jobs))
        wall = time.perf_counter() - begun
        await asyncio.sleep(0.6)  # the engine sends its figures a few times a second
        steps = worker.metric("loramux_step_seconds_sum") - before[0]
        front = cpu_seconds(worker.server.pid) - before[2]
    tokens = sum(n for _, n in answers)
    return {
        "tokens_per_second": tokens / wall,
        "tokens": tokens,
        "wall_seconds": wall,
        "engine_step_seconds": steps,
        "steps": worker.metric("loramux_step_seconds_count") - before[1],
        "beside_the_engine": (wall - steps) / steps,
        "front_cpu_seconds_per_engine_second": front / steps,
        "latency_p50_seconds": statistics.median(seconds for seconds, _ in answers),
        "latency_max_seconds": max(seconds for seconds, _ in answers),
        "latency_alone_p50_seconds": statistics.median(alone),
    }


def load_peft(model: Path, adapters: Path, num_adapters: int) -> Any:
    """The model with every adapter in PEFT."""
    say("loading the adapters into PEFT")
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tuned = peft.PeftModel.from_pretrained(base, adapters / "tenant" / "0", adapter_name="0")
    for i in range(1, num_adapters):
        tuned.load_adapter(adapters / "tenant" / str(i), adapter_name=str(i))
    return tuned.eval()


@torch.inference_mode()
def measure_peft_one(model: Any, jobs: list[tuple[str, str]], new_tokens: int) -> dict[str, Any]:
    """`set_adapter`, then one request."""
    say(f"PEFT one at a time: {len(jobs)} requests")
    seconds: list[float] = []
    for prompt, adapter_id in jobs:
        begun = time.perf_counter()
        model.set_adapter(adapter_id.rpartition("/")[2])
        ids = torch.tensor([list(prompt.encode())])
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **greedy(new_tokens))
        seconds.append(time.perf_counter() - begun)
    return {
        "tokens_per_second": len(jobs) * new_tokens / sum(seconds),
        "latency_p50_seconds": statistics.median(seconds),
    }


@torch.inference_mode()
def measure_peft_mixed(model: Any, jobs: list[tuple[str, str]], new_tokens: int, rows: int) -> dict[str, Any]:
    """`generate` over batches whose rows name their adapters."""
    say(f"PEFT in batches of {rows} with adapter_names: {len(jobs)} requests")
    begun = time.perf_counter()
    for start in range(0, len(jobs), rows):
        batch = jobs[start : start + rows]
        ids = torch.tensor([list(prompt.encode()) for prompt, _ in batch])
        names = [adapter_id.rpartition("/")[2] for _, adapter_id in batch]
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, **greedy(new_tokens))
    wall = time.perf_counter() - begun
    return {"tokens_per_second": len(jobs) * new_tokens / wall, "wall_seconds": wall}


def greedy(new_tokens: int) -> dict[str, Any]:
    """Exactly `new_tokens` greedy tokens."""
    return {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens, "do_sample": False}


def cpu_seconds(pid: int) -> float:
    """Processor time of one process, without its children."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def print_table(figures: dict[str, Any]) -> None:
    """The figures for a person."""
    for name in ("loramux", "peft_one_at_a_time", "peft_mixed_batches"):
        row = figures[name]
        latency = row.get("latency_p50_seconds")
        print(f"{name:24} {row['tokens_per_second']:9.1f} tok/s" + (f"   p50 {latency:.2f} s" if latency else ""))
    one, mixed = figures["times_peft_one_at_a_time"], figures["times_peft_mixed_batches"]
    print(f"{one:.1f} × PEFT one at a time, {mixed:.1f} × PEFT in mixed batches")
    print(f"beside the engine's own time: {figures['loramux']['beside_the_engine']:.1%}")


def say(what: str) -> None:
    """Progress, on standard error."""
    print(f"… {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
