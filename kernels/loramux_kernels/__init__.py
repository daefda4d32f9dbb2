"""Ops of a heterogeneous multi-LoRA step, one a file, each with its torch reference.

The functions of this package are what the worker's model calls. They run on whatever device their tensors are on.
"""

from loramux_kernels.lora import LoraTile, lora_add_
from loramux_kernels.paged_attention import AttentionBatch, paged_attention
from loramux_kernels.sampling import apply_filters, apply_penalties, sample
from loramux_kernels.store_kv import store_kv
from loramux_kernels.uniform import counter_uniform

__all__ = [
    "AttentionBatch",
    "LoraTile",
    "apply_filters",
    "apply_penalties",
    "counter_uniform",
    "lora_add_",
    "paged_attention",
    "sample",
    "store_kv",
]
