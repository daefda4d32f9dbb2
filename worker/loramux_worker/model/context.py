"""What the model's layers need to know of the step that runs through them.

Hugging Face modelling code passes neither the adapters nor the block tables down to its layers, so the runner leaves
them here before each forward pass; every attention and LoRA layer of one model holds the same context.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from loramux_kernels import AttentionBatch, LoraTile

LoraPlan = tuple[tuple[LoraTile, ...], ...]
"""For each target module (by its index) the runs of rows that have an adapter on it."""


@dataclass(slots=True)
class StepContext:
    """The current step: set by the runner, read by the layers."""

    key_caches: list[Tensor] = field(default_factory=list)  # by layer: [blocks, kv_heads, block_size, head_dim]
    value_caches: list[Tensor] = field(default_factory=list)
    attention: AttentionBatch | None = None
    lora: LoraPlan | None = None  # over the rows of the packed batch
    lora_head: LoraPlan | None = None  # over the rows whose logits are asked for
