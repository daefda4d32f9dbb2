"""Ops of a heterogeneous multi-LoRA step, one a file, each with its torch reference.

The functions of this package are what the worker's model calls. They run on whatever device their tensors are on.
"""

from loramux_kernels.add_rms_norm import add_rms_norm
from loramux_kernels.decode_attention import SplitCounters, decode_attention
from loramux_kernels.draw import draw_tokens
from loramux_kernels.gated_activation import Activation, gated_activation
from loramux_kernels.linear import gated_linear, is_for_library, linear
from loramux_kernels.lora import (
    LoraRows,
    LoraSite,
    LoraTile,
    LoraWeights,
    lora_add_,
    lora_delta,
    lora_delta_add_,
    lora_gated_activation,
)
from loramux_kernels.paged_attention import AttentionBatch, paged_attention
from loramux_kernels.rotary import RotaryLayer, rotate_and_store
from loramux_kernels.sampling import apply_penalties, greedy
from loramux_kernels.store_kv import store_kv
from loramux_kernels.top_tokens import top_tokens
from loramux_kernels.uniform import counter_uniform

__all__ = [
    "Activation",
    "AttentionBatch",
    "LoraRows",
    "LoraSite",
    "LoraTile",
    "LoraWeights",
    "RotaryLayer",
    "SplitCounters",
    "add_rms_norm",
    "apply_penalties",
    "counter_uniform",
    "decode_attention",
    "draw_tokens",
    "gated_activation",
    "gated_linear",
    "greedy",
    "is_for_library",
    "linear",
    "lora_add_",
    "lora_delta",
    "lora_delta_add_",
    "lora_gated_activation",
    "paged_attention",
    "rotate_and_store",
    "store_kv",
    "top_tokens",
]
