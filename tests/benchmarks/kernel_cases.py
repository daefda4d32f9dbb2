"""What `bench_kernels.py` times: LoRA, linear layers and norms over random inputs of a model's true shape.

A case is one op over several layers, each with weights or a cache of its own, so that what a layer reads has left L2 by
the time its turn comes again. It knows the bytes that it cannot do without, and compares itself with torch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from loramux_kernels import (
    Activation,
    LoraRows,
    LoraSite,
    LoraWeights,
    add_rms_norm,
    gated_activation,
    gated_linear,
    linear,
    lora_delta,
)
from loramux_kernels.add_rms_norm import add_rms_norm_reference
from loramux_kernels.gated_activation import gated_activation_reference
from loramux_kernels.linear import gated_linear_reference, linear_reference
from loramux_kernels.lora_plan import plan_rows

BEYOND_L2 = 256 << 20  # bytes between two reads of the same: some times the 50 to 60 MB of L2


@dataclass(frozen=True)
class Case:
    """One op at one size; `calls` are the layers, the same over tensors of their own."""

    name: str
    calls: Sequence[Callable[[], object]]
    num_bytes: float  # of one call, everything read and written once
    error: Callable[[], float]  # relative, of the first call, against torch
    flops: float = 0.0  # of one call, where it is long enough to be bound by them
    library: Sequence[Callable[[], object]] = ()  # the same by torch alone


@dataclass(frozen=True)
class Site:
    """Sibling projections of one input."""

    name: str
    inner: int
    widths: tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """Sizes of a decoder, and where its tensors are."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    device: torch.device
    dtype: torch.dtype = torch.bfloat16

    @classmethod
    def of(cls, config: dict[str, Any], device: torch.device) -> Shape:
        """The sizes in a model's configuration."""
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        sizes = (config["num_key_value_heads"], hidden // heads, config["vocab_size"])
        return cls(hidden, config["intermediate_size"], heads, *sizes, device)

    @property
    def sites(self) -> tuple[Site, ...]:
        """The packed linears of a layer."""
        keys = self.kv_heads * self.head_dim
        return (
            Site("qkv", self.hidden, (self.heads * self.head_dim, keys, keys)),
            Site("o", self.heads * self.head_dim, (self.hidden,)),
            Site("gate_up", self.hidden, (self.intermediate, self.intermediate)),
            Site("down", self.intermediate, (self.hidden,)),
        )

    def random(self, *sizes: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        """Normal numbers: a product of zeros would run faster than the real one."""
        return torch.empty(sizes, dtype=dtype or self.dtype, device=self.device).normal_(std=std)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Of the whole tensor, in its norm; infinite where there is a NaN, which `max` might overlook."""
    error = (actual.float() - expected.float()).norm() / expected.float().norm()
    return float(error.nan_to_num(nan=float("inf")))


def copies(num_bytes: float, least: int = 8) -> int:
    """Layers that a case needs for its bytes to leave L2."""
    return max(least, -int(-BEYOND_L2 // num_bytes))


@dataclass(frozen=True)
class Mix:
    """The slot of each row, in runs."""

    ranks: tuple[int, ...]  # of the slots of the pool
    slots: tuple[int, ...]
    rows_in_segment: int = 1  # 1: row by row


_EVEN = (16,) * 256
_ZIPF = tuple(sorted(random.Random(1).choices(range(256), [1 / (i + 1) for i in range(256)], k=64)))
_EIGHTS, _SIXTY_FOURS = (tuple(i // n for i in range(64 * n)) for n in (8, 64))

MIXES: dict[str, Mix] = {
    "1 token": Mix(_EVEN, (0,)),
    **{f"{n} distinct": Mix(_EVEN, tuple(range(n))) for n in (8, 32, 64, 128, 256)},
    "64 tokens, one adapter, by segment": Mix(_EVEN, (0,) * 64, 16),
    "256 tokens, one adapter, by segment": Mix(_EVEN, (0,) * 256, 16),
    "64 = 8 adapters x 8, by token": Mix(_EVEN, _EIGHTS[:64]),
    "64 = 8 adapters x 8, by segment": Mix(_EVEN, _EIGHTS[:64], 16),
    "64 Zipf(1) over 256, by token": Mix(_EVEN, _ZIPF),
    "64 Zipf(1) over 256, by segment": Mix(_EVEN, _ZIPF, 16),
    "prefill 4096 = 64 adapters x 64": Mix(_EVEN, _SIXTY_FOURS, 64),
    "prefill 4096, one adapter": Mix(_EVEN, (0,) * 4096, 64),
    "64 distinct, ranks 16/32/64/128": Mix((16, 32, 64, 128) * 16, tuple(range(64))),
    "63 of rank 8, one of rank 256": Mix((*(8,) * 63, 256), tuple(range(64))),
}


class Pool:
    """Random adapters on all sites of some layers, in one run of elements as the worker keeps them."""

    def __init__(self, shape: Shape, ranks: Sequence[int], layers: int = 8) -> None:
        self.shape, self.ranks, self.layers = shape, ranks, layers
        widths = [(site.inner, width) for site in shape.sites for width in site.widths]
        self.num_targets, self.per_rank = len(widths), sum(map(sum, widths))
        sizes = torch.tensor(widths * layers).flatten() * torch.tensor(ranks)[:, None]  # [slots, A and B by target]
        offsets = (sizes.flatten().cumsum(0).view(sizes.shape) - sizes).unflatten(1, (-1, 2)).to(shape.device)
        self.weights = LoraWeights(
            shape.random(int(sizes.sum()), std=0.05),
            offsets[..., 0].contiguous(),
            offsets[..., 1].contiguous(),
            torch.tensor(ranks, dtype=torch.int32, device=shape.device)[:, None].repeat(1, layers * self.num_targets),
            max_rank=max(ranks),
        )

    def rows(self, mix: Mix, shift: int) -> LoraRows:
        """The rows of a mix, with other adapters for each shift."""
        slots = [slot + shift for slot in mix.slots]
        return plan_rows(slots, self.ranks, mix.rows_in_segment, torch.device(self.shape.device))

    def layer(self, inputs: Sequence[Tensor], rows: LoraRows, layer: int) -> list[Tensor]:
        """The deltas of a layer's sites."""
        firsts = accumulate((len(site.widths) for site in self.shape.sites), initial=layer * self.num_targets)
        return [
            lora_delta(x, self.weights, rows, LoraSite(first, site.widths))
            for x, first, site in zip(inputs, firsts, self.shape.sites, strict=False)
        ]

    def tile(self, offsets: Tensor, slot: int, target: int, width: int) -> Tensor:
        """A or B of one adapter at one target: float32 [rank, width]."""
        first = int(offsets[slot, target])
        return self.weights.elements[first : first + self.ranks[slot] * width].view(-1, width).float()

    def expected(self, inputs: Sequence[Tensor], slots: Sequence[int]) -> list[Tensor]:
        """The deltas of the first layer by torch in float32, run by run."""
        outs, first = [], 0
        for x, site in zip(inputs, self.shape.sites, strict=True):
            runs = []
            for start, end, slot in _runs(slots):
                parts = []
                for target, width in enumerate(site.widths, first):
                    a = self.tile(self.weights.a_offsets, slot, target, site.inner)
                    b = self.tile(self.weights.b_offsets, slot, target, width)
                    parts.append(x[start:end].float() @ a.t() @ b)
                runs.append(torch.cat(parts, dim=1))
            outs.append(torch.cat(runs))
            first += len(site.widths)
        return outs


def _runs(slots: Sequence[int]) -> list[tuple[int, int, int]]:
    """First row, last row (exclusive) and slot of the rows of each adapter."""
    runs, start = [], 0
    for slot, run in groupby(slots):
        runs.append((start, end := start + len(list(run)), slot))
        start = end
    return runs


def lora_cases(shape: Shape, names: Sequence[str]) -> Iterator[Case]:
    """All four sites of a layer, in the mixes of those names."""
    for ranks, group in groupby(names, key=lambda name: MIXES[name].ranks):
        pool = Pool(shape, ranks)
        for name in group:
            yield _lora_case(pool, name, MIXES[name])


def _lora_case(pool: Pool, name: str, mix: Mix) -> Case:
    shape, tokens = pool.shape, len(mix.slots)
    by_width = {site.inner: shape.random(tokens, site.inner) for site in shape.sites}
    inputs = [by_width[site.inner] for site in shape.sites]
    item = shape.dtype.itemsize
    adapters = sum(mix.ranks[slot] for slot in set(mix.slots)) * pool.per_rank * item
    activations = tokens * sum(site.inner + sum(site.widths) for site in shape.sites) * item
    rotated = adapters + (activations if activations > BEYOND_L2 else 0)
    step = max(mix.slots) + 1
    shifts = range(0, len(mix.ranks) - step + 1, step)  # few adapters: others of the pool for other layers
    rows = [pool.rows(mix, shift) for shift in shifts[: -(-copies(rotated) // pool.layers)]]
    calls = [partial(pool.layer, inputs, r, layer) for r in rows for layer in range(pool.layers)]

    def error() -> float:
        deltas = zip(pool.layer(inputs, rows[0], 0), pool.expected(inputs, mix.slots), strict=True)
        return max(relative_error(*pair) for pair in deltas)

    flops = 2 * pool.per_rank * sum(mix.ranks[slot] for slot in mix.slots) if tokens >= 1024 else 0
    return Case(name, calls, adapters + activations, error, flops)


def linear_cases(shape: Shape, rows: Sequence[int]) -> Iterator[Case]:
    """The packed linears of a layer and the head."""
    for site in (*shape.sites, Site("head", shape.hidden, (shape.vocabulary,))):
        columns = sum(site.widths)
        size = columns * site.inner * shape.dtype.itemsize
        count = copies(size, least=1) if site.name == "head" else copies(size)
        weights = [shape.random(columns, site.inner, std=site.inner**-0.5) for _ in range(count)]
        for num_rows in rows:
            yield _linear_case(shape, site, weights, num_rows)


def _linear_case(shape: Shape, site: Site, weights: Sequence[Tensor], rows: int) -> Case:
    gated, columns, x = site.name == "gate_up", sum(site.widths), shape.random(rows, site.inner)
    op: Callable[[Tensor, Tensor], Tensor] = partial(gated_linear, activation=Activation.SILU) if gated else linear

    def error() -> float:
        actual = op(x, weights[0])
        if gated:
            return relative_error(actual, gated_linear_reference(x, weights[0], Activation.SILU))
        return relative_error(actual.float().sum(0), linear_reference(x, weights[0])[0])

    elements = columns * site.inner + rows * (site.inner + columns // (2 if gated else 1))
    return Case(
        f"{site.name}{' + SiLU' if gated else ''}, M = {rows}",
        [partial(op, x, w) for w in weights],
        elements * shape.dtype.itemsize,
        error,
        2.0 * rows * columns * site.inner if rows >= 64 else 0.0,
        [partial(torch.mm, x, w.t()) for w in weights],
    )


def norm_cases(shape: Shape, rows: Sequence[int]) -> Iterator[Case]:
    """Addition and norm, and the activation of a step too long for `gated_linear`'s own kernel.

    One set of tensors for all layers: in a step too, what a norm reads was written by the kernel before it.
    """
    for num_rows in rows:
        for pieces in (0, 1, 4):
            yield _norm_case(shape, num_rows, pieces)
        if num_rows > 128:
            yield _activation_case(shape, num_rows)


def _norm_case(shape: Shape, rows: int, pieces: int) -> Case:
    residual, gain = shape.random(rows, shape.hidden), shape.random(shape.hidden)
    # what `linear` leaves: a whole sum in the model's dtype, or several parts in float32
    dtype = torch.float32 if pieces > 1 else shape.dtype
    partials = shape.random(pieces, rows, shape.hidden, dtype=dtype) if pieces else None

    def error() -> float:
        actual = add_rms_norm(residual, partials, gain, 1e-5)
        expected = add_rms_norm_reference(residual, partials, gain, 1e-5)
        return max(relative_error(*pair) for pair in zip(actual, expected, strict=True))

    whole = (3 if pieces else 2) * residual.numel() + gain.numel()  # the sum is written where there is one
    num_bytes = whole * shape.dtype.itemsize + pieces * residual.numel() * dtype.itemsize
    name = f"add_rms_norm, {rows} rows, {pieces} piece{'' if pieces == 1 else 's'}"
    return Case(name, [partial(add_rms_norm, residual, partials, gain, 1e-5)], num_bytes, error)


def _activation_case(shape: Shape, rows: int) -> Case:
    gate_up = shape.random(rows, 2 * shape.intermediate)

    def error() -> float:
        actual = gated_activation(gate_up, Activation.SILU)
        return relative_error(actual, gated_activation_reference(gate_up, Activation.SILU))

    num_bytes = 3 * rows * shape.intermediate * shape.dtype.itemsize
    calls = [partial(gated_activation, gate_up, Activation.SILU)]
    return Case(f"gated_activation, {rows} rows", calls, num_bytes, error)
