"""Paged attention behind Hugging Face's `AttentionInterface`.

The modelling code of an architecture stays the definition: it projects, normalises and rotates queries and keys, then
calls the function registered here under the name in its config, which stores the new keys and values in the blocks of
their sequences and attends over the cache. No mask is registered, so `attention_mask` is always None.
"""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers import AttentionInterface

from loramux_kernels import paged_attention, store_kv
from loramux_worker.model.context import StepContext

IMPLEMENTATION = "loramux"
"""The name for `attn_implementation`."""

# keywords that modelling code passes along and that change nothing here
_IGNORED = frozenset(
    {
        "cache_position",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


class UnsupportedAttention(Exception):
    """The modelling code asks for something that this attention does not do; the message says what."""


def attach(model: nn.Module, context: StepContext) -> int:
    """Give every attention layer of `model` the context; returns how many layers there are."""
    layers = [m for m in model.modules() if getattr(m, "layer_idx", None) is not None and _is_attention(m)]
    for layer in layers:
        layer.step_context = context  # type: ignore[assignment]  # nn.Module takes any attribute
    return len(layers)


def _is_attention(module: nn.Module) -> bool:
    return "Attention" in type(module).__name__


def _paged(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **unknown: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, T, head_dim], key and value [1, kv_heads, T, head_dim] → [1, T, heads, head_dim]."""
    asked = {name for name, value in unknown.items() if value is not None} - _IGNORED
    if asked:
        raise UnsupportedAttention(f"its attention uses {', '.join(sorted(asked))}")
    context = cast(StepContext, module.step_context)
    layer = cast(int, module.layer_idx)
    assert context.batch is not None, "the batch is set before the forward pass"
    batch = context.batch.attention
    key_cache, value_cache = context.key_caches[layer], context.value_caches[layer]
    store_kv(key[0].transpose(0, 1), value[0].transpose(0, 1), key_cache, value_cache, batch.slot_mapping)
    out = paged_attention(
        query[0].transpose(0, 1),
        key_cache,
        value_cache,
        batch,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        sliding_window=sliding_window,
        softcap=softcap,
    )
    return out[None], None


AttentionInterface.register(IMPLEMENTATION, _paged)
