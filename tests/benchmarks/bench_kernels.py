"""What each kernel takes on a GPU, beside the bytes that it cannot do without.

    python tests/benchmarks/bench_kernels.py [--shape 8b|1b] [--only lora,linear,attention,norm,draw] [--quick]

For each op a table: microseconds of one call, its floor (every byte read and written once, over the bandwidth of a
copy on this card) and their ratio. A call is
    lora       shrink and expand at all sites of a layer, rank 16 if not said; "n distinct", "by token": row by row
    linear     one packed weight; torch.mm is the same product by the vendor's library, without the activation
    attention  one layer; decode_attention rotates and stores the new token too, paged_attention is a prefill
    norm       add_rms_norm, its input in L2 as it is in a step, so that a ratio under 1 is possible
    draw       a token for each row of float32 logits, under filters; torch sorts

Times are replays of a CUDA graph of many calls in a row, as a step is one: launches overlap (programmatic dependent
launch), and each call has weights, adapters or a cache of its own, so that L2 holds none of them. Every case is
compared with torch first: a kernel that is wrong ends the run. The first run compiles the kernels, about a minute.
The last line of the output is a JSON object with machine, versions and figures.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from draw_cases import draw_cases
from kernel_cases import MIXES, Case, Shape, copies, linear_cases, lora_cases, norm_cases, relative_error
from machine import describe_machine
from torch import Tensor

from loramux_kernels import (
    AttentionBatch,
    RotaryLayer,
    SplitCounters,
    decode_attention,
    paged_attention,
    rotate_and_store,
    store_kv,
)
from loramux_kernels.paged_attention import reference_paged_attention
from loramux_kernels.rotary import rotate_and_store_reference

BLOCK_SIZE = 16
MOST_ERROR = 2e-2  # relative, that rounding to bfloat16 explains
ENOUGH_BYTES, ENOUGH_CALLS = 4e9, 256  # a graph is long enough for its launch not to count


@dataclass(frozen=True)
class Sequences:
    """A step: so many sequences, each with `new` tokens at the end of `context`."""

    count: int
    new: int
    context: int

    @property
    def blocks(self) -> int:
        """Blocks of one sequence."""
        return -(-self.context // BLOCK_SIZE)

    def __str__(self) -> str:
        whole = f"{self.count} x {self.context}"
        return whole if self.new in (1, self.context) else f"{whole}, the last {self.new}"


@dataclass(frozen=True)
class Selection:
    """What is measured of each op."""

    mixes: Sequence[str]
    rows: Sequence[int]
    decodes: Sequence[Sequences]
    prefills: Sequence[Sequences]
    norm_rows: Sequence[int]


_DECODES = ((1, 192), (1, 1024), (1, 4096), (8, 4096), (64, 192), (64, 1024), (64, 4096), (256, 192))
FULL = Selection(
    mixes=tuple(MIXES),
    rows=(1, 8, 16, 32, 64, 128, 256),
    decodes=tuple(Sequences(count, 1, context) for count, context in _DECODES),
    prefills=(Sequences(64, 64, 64), Sequences(1, 2048, 2048), Sequences(1, 256, 4096 + 256)),
    norm_rows=(1, 64, 256, 4096),
)
QUICK = Selection(
    mixes=("1 token", "64 distinct", "256 distinct", "64 tokens, one adapter, by segment"),
    rows=(1, 64),
    decodes=(Sequences(1, 1, 1024), Sequences(64, 1, 192)),
    prefills=(Sequences(64, 64, 64),),
    norm_rows=(64,),
)

Round = tuple[tuple[Tensor, Tensor], Tensor, AttentionBatch]  # keys and values, positions, batch


class Caches:
    """Random keys and values of some layers, with room for the largest step in each."""

    def __init__(self, shape: Shape, steps: Sequence[Sequences], layers: int = 4) -> None:
        self.shape = shape
        self.num_blocks = max(step.count * step.blocks for step in steps)
        self.table_width = max(step.blocks for step in steps)
        sizes = (self.num_blocks, shape.kv_heads, BLOCK_SIZE, shape.head_dim)
        self.layers = [(shape.random(*sizes), shape.random(*sizes)) for _ in range(layers)]
        self._order = torch.randperm(self.num_blocks).to(torch.int32)
        frequencies = 10000.0 ** -torch.linspace(0, 1, shape.head_dim // 2)
        angles = torch.arange(self.table_width * BLOCK_SIZE)[:, None] * frequencies
        cos, sin = angles.cos().to(shape.device), angles.sin().to(shape.device)
        head = (shape.heads, shape.kv_heads, shape.head_dim)
        self.rotary = RotaryLayer(*head, cos, sin, scale=shape.head_dim**-0.5)
        self.token_bytes = 2 * shape.kv_heads * shape.head_dim * shape.dtype.itemsize

    def rounds(self, step: Sequences) -> list[Round]:
        """What each call works on: the layers in turn, in each turn other blocks of them."""
        count = copies(step.count * step.context * self.token_bytes)
        return [(self.layers[i % len(self.layers)], *self._batch(step, i)) for i in range(count)]

    def _batch(self, step: Sequences, index: int) -> tuple[Tensor, AttentionBatch]:
        needed, device = step.count * step.blocks, self.shape.device
        at = (index // len(self.layers) * needed + torch.arange(needed)) % self.num_blocks
        tables = torch.zeros(step.count, self.table_width, dtype=torch.int32)
        tables[:, : step.blocks] = self._order[at].view(step.count, -1)
        positions = torch.arange(step.context - step.new, step.context).repeat(step.count)
        owner = torch.arange(step.count).repeat_interleave(step.new)
        slots = tables[owner, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        batch = AttentionBatch(
            query_starts=(torch.arange(step.count + 1) * step.new).to(device, torch.int32),
            context_lens=torch.full((step.count,), step.context, dtype=torch.int32, device=device),
            block_tables=tables.to(device),
            table_rows=torch.arange(step.count, dtype=torch.int32, device=device),
            slot_mapping=slots.to(device, torch.int32),
            most_query_tokens=step.new,
        )
        return positions.to(device, torch.int32), batch


def stored(kv: tuple[Tensor, Tensor], batch: AttentionBatch) -> Tensor:
    """A copy of what the cache holds of a step's tokens: [2, tokens, kv_heads, head_dim]."""
    slots = batch.slot_mapping.long()
    return torch.stack([cache[slots // BLOCK_SIZE, :, slots % BLOCK_SIZE] for cache in kv])


def attention_cases(shape: Shape, decodes: Sequence[Sequences], prefills: Sequence[Sequences]) -> Iterator[Case]:
    """Decode steps, prefills, and what a prefill does before it attends."""
    caches = Caches(shape, [*decodes, *prefills])
    counters = SplitCounters.make(shape.kv_heads, shape.device)
    yield from (_decode_case(caches, counters, step) for step in decodes)
    yield from (_prefill_case(caches, step) for step in prefills)
    yield from _store_cases(caches, max(prefills, key=lambda step: step.count * step.new))


def _decode_case(caches: Caches, counters: SplitCounters, step: Sequences) -> Case:
    shape, rotary, rounds = caches.shape, caches.rotary, caches.rounds(step)
    qkv = shape.random(1, step.count, rotary.width)
    calls = [partial(decode_attention, qkv, at, rotary, *kv, batch, counters) for kv, at, batch in rounds]

    def error() -> float:
        actual = calls[0]()
        kv, positions, batch = rounds[0]
        picks = torch.linspace(0, step.count - 1, min(step.count, 8), device=shape.device).long()
        few = replace(
            batch,
            query_starts=torch.arange(len(picks) + 1, device=shape.device),
            context_lens=batch.context_lens[picks],
            table_rows=batch.table_rows[picks],
            slot_mapping=batch.slot_mapping[picks],
        )
        written = stored(kv, few)
        # it stores the same keys and values once more, before it looks at the cache
        query = rotate_and_store_reference(qkv[:, picks], positions[picks], rotary, *kv, few.slot_mapping)
        expected = reference_paged_attention(query, *kv, few, scale=rotary.scale).flatten(1)
        return max(relative_error(actual[picks], expected), relative_error(written, stored(kv, few)))

    new = step.count * (rotary.width + shape.heads * shape.head_dim) * shape.dtype.itemsize
    return Case(f"decode_attention {step}", calls, step.count * step.context * caches.token_bytes + new, error)


def _prefill_case(caches: Caches, step: Sequences) -> Case:
    shape, rounds, scale = caches.shape, caches.rounds(step), caches.rotary.scale
    query = shape.random(step.count * step.new, shape.heads, shape.head_dim)
    calls = [partial(paged_attention, query, *kv, batch, scale=scale) for kv, _, batch in rounds]

    def error() -> float:
        kv, _, batch = rounds[0]
        return relative_error(calls[0](), reference_paged_attention(query, *kv, batch, scale=scale))

    seen = step.count * step.new * (step.context - (step.new - 1) / 2)  # keys that all queries see
    num_bytes = step.count * step.context * caches.token_bytes + 2 * query.numel() * shape.dtype.itemsize
    return Case(f"paged_attention {step}", calls, num_bytes, error, 4 * seen * shape.heads * shape.head_dim)


def _store_cases(caches: Caches, step: Sequences) -> Iterator[Case]:
    shape, rotary, rounds = caches.shape, caches.rotary, caches.rounds(step)
    qkv = shape.random(1, tokens := step.count * step.new, rotary.width)
    keys, values = qkv[0].unflatten(-1, (-1, shape.head_dim))[:, shape.heads :].chunk(2, dim=1)
    rotations = [partial(rotate_and_store, qkv, at, rotary, *kv, batch.slot_mapping) for kv, at, batch in rounds]
    stores = [partial(store_kv, keys, values, *kv, batch.slot_mapping) for kv, _, batch in rounds]

    def rotation_error() -> float:
        kv, positions, batch = rounds[0]
        actual, written = rotations[0](), stored(kv, batch)
        expected = rotate_and_store_reference(qkv, positions, rotary, *kv, batch.slot_mapping)
        return max(relative_error(actual, expected), relative_error(written, stored(kv, batch)))

    def store_error() -> float:
        stores[0]()
        kv, _, batch = rounds[0]
        return relative_error(stored(kv, batch), torch.stack([keys, values]))

    num_bytes = 2 * qkv.numel() * shape.dtype.itemsize
    yield Case(f"rotate_and_store, {tokens} tokens", rotations, num_bytes, rotation_error)
    yield Case(f"store_kv, {tokens} tokens", stores, 2 * tokens * caches.token_bytes, store_error)


def time_calls(calls: Sequence[Callable[[], object]], num_bytes: float, median: Callable[..., float]) -> float:
    """Microseconds of one call among many, which a CUDA graph holds as often as it takes to be measured."""
    calls[0]()
    repeats = max(1, min(-int(-ENOUGH_BYTES // (num_bytes * len(calls))), -(-ENOUGH_CALLS // len(calls))))
    if median(calls[0]) > 1e-3:  # so long a call is measured well enough a few times
        repeats = 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            for call in calls:
                call()
    return median(graph.replay) / (repeats * len(calls)) * 1e6


def measure(case: Case, bandwidth: float, median: Callable[..., float]) -> dict[str, Any]:
    """The figures of a case, once it agrees with torch."""
    error = case.error()
    assert error <= MOST_ERROR, f"{case.name}: relative error {error:.1e} against torch, at most {MOST_ERROR:.0e}"
    taken = time_calls(case.calls, case.num_bytes, median)
    floor = case.num_bytes / bandwidth * 1e6
    figures = {"us": taken, "floor_us": floor, "ratio": taken / floor}
    if case.library:
        figures["torch_us"] = time_calls(case.library, case.num_bytes, median)
    if case.flops:
        figures["TFLOP_s"] = case.flops / taken / 1e6
    return {"case": case.name, **{name: round(x, 2) for name, x in figures.items()}, "error": float(f"{error:.2g}")}


def print_row(row: dict[str, Any]) -> None:
    """One line of a table."""
    more = "".join(f"{row[key]:>12}" if key in row else " " * 12 for key in ("torch_us", "TFLOP_s"))
    print(f"{row['case']:<44}{row['us']:>10.2f}{row['floor_us']:>10.2f}{row['ratio']:>8.2f}{more}", flush=True)


def main() -> None:
    """Run what was asked for and print the figures."""
    arguments = _arguments()
    if not torch.cuda.is_available():
        sys.exit("bench_kernels: no NVIDIA GPU is visible to PyTorch, and these figures mean nothing without one")
    from gpu_rig import SHAPES, copy_bandwidth, median_of_replays  # the whole worker: not for --help

    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    shape = Shape.of(SHAPES[arguments.shape], torch.device("cuda"))
    chosen = QUICK if arguments.quick else FULL
    ops: dict[str, Callable[[], Iterator[Case]]] = {
        "lora": lambda: lora_cases(shape, chosen.mixes),
        "linear": lambda: linear_cases(shape, chosen.rows),
        "attention": lambda: attention_cases(shape, chosen.decodes, chosen.prefills),
        "norm": lambda: norm_cases(shape, chosen.norm_rows),
        "draw": lambda: draw_cases(shape, (64,) if arguments.quick else (1, 64, 256)),
    }
    bandwidth = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, a copy at {bandwidth / 1e12:.2f} TB/s; shape {arguments.shape}")
    figures: dict[str, list[dict[str, Any]]] = {}
    for op in arguments.only:
        print(f"\n{op:<44}{'us':>10}{'floor':>10}{'ratio':>8}{'torch':>12}{'TFLOP/s':>12}")
        figures[op] = []
        for case in ops[op]():
            figures[op].append(measure(case, bandwidth, median_of_replays))
            print_row(figures[op][-1])
    about = {"benchmark": "kernels", "shape": arguments.shape, **describe_machine()}
    print(json.dumps({**about, "copy_bandwidth_TB_s": round(bandwidth / 1e12, 3), **figures}))


def _ops(text: str) -> list[str]:
    known, asked = ("lora", "linear", "attention", "norm", "draw"), text.split(",")
    if unknown := [op for op in asked if op not in known]:
        raise argparse.ArgumentTypeError(f"no op {unknown[0]!r}; say any of {','.join(known)}")
    return asked


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("8b", "1b"), default="8b", help="Llama 3.1 8B (default) or TinyLlama 1.1B")
    parser.add_argument("--only", type=_ops, default="lora,linear,attention,norm,draw", help="some of these ops")
    parser.add_argument("--quick", action="store_true", help="a few cases of each op, for a look while tuning")
    return parser.parse_args()


if __name__ == "__main__":
    main()
