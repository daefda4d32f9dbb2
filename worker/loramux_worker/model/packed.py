"""The weights of a decoder of the Llama shape, packed for a decoder of ours.

Siblings are packed into one weight, of which the modules of the Hugging Face model become views: nothing is twice in
memory, and its modelling code still runs, to be compared with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loramux_kernels import Activation, LoraSite, RotaryLayer
from loramux_worker.model.lora_layers import LoraLinear

_ARCHITECTURES = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3"})
_ACTIVATIONS = {"silu": Activation.SILU, "swish": Activation.SILU, "gelu_pytorch_tanh": Activation.GELU_TANH}


@dataclass(frozen=True, slots=True)
class Projection:
    """Sibling projections in one weight [sum of widths, in_features]."""

    weight: Tensor
    bias: Tensor | None
    site: LoraSite


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """One decoder layer."""

    input_norm: Tensor
    qkv: Projection
    rotary: RotaryLayer
    o: Projection
    post_norm: Tensor
    gate_up: Projection
    down: Projection


@dataclass(frozen=True, slots=True)
class PackedModel:
    """A whole model; embedding and head are its own modules."""

    embedding: Any
    layers: list[PackedLayer]
    norm: Tensor
    head: Any
    eps: float
    activation: Activation


def pack(module: Any, num_positions: int) -> PackedModel | None:
    """Pack a model for contexts of at most `num_positions`; None, and nothing done, where its shape is another."""
    config = module.config
    if config.model_type not in _ARCHITECTURES or config.hidden_act not in _ACTIVATIONS:
        return None
    rotary = getattr(config, "rope_parameters", None) or {}
    if rotary.get("partial_rotary_factor", 1.0) != 1.0 or _head_dim(config) % 2:
        return None
    cos, sin = _rotary_tables(module, num_positions)
    return PackedModel(
        embedding=module.get_input_embeddings(),
        layers=[_pack_layer(layer, config, cos, sin) for layer in module.model.layers],
        norm=module.model.norm.weight,
        head=module.get_output_embeddings(),
        eps=config.rms_norm_eps,
        activation=_ACTIVATIONS[config.hidden_act],
    )


def _head_dim(config: Any) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _pack_layer(layer: Any, config: Any, cos: Tensor, sin: Tensor) -> PackedLayer:
    attention, mlp = layer.self_attn, layer.mlp
    query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return PackedLayer(
        input_norm=layer.input_layernorm.weight,
        qkv=_pack(attention, "qkv_proj", "q_proj", "k_proj", "v_proj"),
        rotary=RotaryLayer(
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=_head_dim(config),
            cos=cos,
            sin=sin,
            query_gain=None if query_norm is None else query_norm.weight,
            key_gain=None if key_norm is None else key_norm.weight,
            eps=0.0 if query_norm is None else query_norm.variance_epsilon,
            sliding_window=_sliding_window(layer, config),
            scale=attention.scaling,
        ),
        o=_pack(attention, "o_proj"),
        post_norm=layer.post_attention_layernorm.weight,
        gate_up=_pack(mlp, "gate_up_proj", "gate_proj", "up_proj"),
        down=_pack(mlp, "down_proj"),
    )


def _sliding_window(layer: Any, config: Any) -> int | None:
    """As each architecture's attention passes it on: Qwen by layer, Mistral and Phi-3 for all."""
    attention = layer.self_attn
    window = attention.sliding_window if hasattr(attention, "sliding_window") else _config_window(config)
    return None if window is None else int(window)


def _config_window(config: Any) -> int | None:
    window: int | None = getattr(config, "sliding_window", None)
    return window


def _pack(parent: nn.Module, packed: str, *siblings: str) -> Projection:
    """The module of that name, or its siblings packed into one weight of which they become views."""
    names = siblings if siblings and not hasattr(parent, packed) else (packed,)
    modules = [getattr(parent, name) for name in names]
    assert all(isinstance(m, LoraLinear) for m in modules), f"{names} are linear layers"
    first = modules[0]
    assert [m.target for m in modules] == list(range(first.target, first.target + len(modules))), "targets in order"
    site = LoraSite(first.target, tuple(m.out_features for m in modules))
    if len(modules) == 1:
        return Projection(first.weight.data, None if first.bias is None else first.bias.data, site)
    weight = torch.cat([m.weight.data for m in modules])
    for m, view in zip(modules, weight.split(list(site.widths)), strict=True):
        m.weight.data = view
    bias = None if first.bias is None else torch.cat([m.bias.data for m in modules])
    return Projection(weight, bias, site)


def _rotary_tables(module: Any, count: int) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [count, head_dim / 2], from the model's own module.

    It scales by the largest position that it is asked for (longrope), so no further one may be among them.
    """
    where = module.get_input_embeddings().weight.device
    positions = torch.arange(count, device=where)[None]
    with torch.inference_mode(False), torch.no_grad():
        tables = module.model.rotary_emb(torch.empty(0, dtype=torch.float32, device=where), positions)
    cos, sin = (t[0, :, : t.shape[-1] // 2].float().contiguous() for t in tables)
    return cos, sin
