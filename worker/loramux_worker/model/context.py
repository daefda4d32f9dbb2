"""What a forward pass works on, and where the model's layers find it.

Hugging Face modelling code passes neither the adapters nor the block tables down to its layers, so the batch lies in a
context that every attention and LoRA layer of one model holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from torch import Tensor

from loramux_kernels import Activation, AttentionBatch, LoraSite, LoraTile
from loramux_worker.adapters.own_weights import OwnWeights


class StepLora(Protocol):
    """The adapters of a batch's rows, for the layers that they may touch."""

    def add_(self, out: Tensor, x: Tensor, target: int) -> None:
        """out [rows, out_features] += the adapters' share of x [rows, in_features] at one target, in place."""

    def add_site_(self, out: Tensor, x: Tensor, site: LoraSite) -> None:
        """out [rows, sum of widths] += the adapters' share at sibling targets, in place."""

    def delta(self, x: Tensor, site: LoraSite) -> Tensor:
        """The adapters' share at sibling targets, side by side [rows, sum of widths]."""

    def gated_linear(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, site: LoraSite, activation: Activation
    ) -> Tensor:
        """act(gate) ⊙ up [rows, n] of packed gate and up projections, with the adapters' share in both."""


class OwnRun(NamedTuple):
    """Rows `start` to `end` (exclusive) whose adapter has weights beside LoRA; `tiles` by target module."""

    start: int
    end: int
    own: OwnWeights
    tiles: Sequence[tuple[Tensor, Tensor] | None]


@dataclass(frozen=True, slots=True)
class StepBatch:
    """Rows of sequences, packed. All tensors are on the model's device."""

    input_ids: Tensor  # int64 [T]
    positions: Tensor  # int32 [T]
    rows: Tensor | None  # int64, the rows whose logits are asked for; None: every row
    attention: AttentionBatch
    lora: StepLora | None = None  # over all rows
    lora_head: StepLora | None = None  # over the rows whose logits are asked for
    lora_embedding: tuple[LoraTile, ...] = ()  # runs of rows whose adapter touches the embedding
    own: tuple[OwnRun, ...] = ()  # runs of rows whose adapter has more than LoRA, over all rows
    own_head: tuple[OwnRun, ...] = ()  # the same over the rows whose logits are asked for


@dataclass(slots=True)
class StepContext:
    """The paged cache, and the batch that is being computed."""

    key_caches: list[Tensor] = field(default_factory=list)  # by layer: [blocks, kv_heads, block_size, head_dim]
    value_caches: list[Tensor] = field(default_factory=list)
    batch: StepBatch | None = None
