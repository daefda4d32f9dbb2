"""A decoder of the Llama shape in torch's own ops, as few as there can be: for CPUs.

Between two products of a small model there is little to compute, and what a step takes is how often it calls torch. So
what all layers share (rotations, places in the cache, masks) is looked up once a step, siblings are one product, and
what ends a block is added to the residual where it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from loramux_kernels import Activation, RotaryLayer
from loramux_kernels.padded_attention import CacheRows, PaddedAttention
from loramux_worker.model.context import StepBatch, StepContext, StepLora
from loramux_worker.model.packed import PackedModel, Projection


class TorchDecoder:
    """The whole model; the context holds the paged cache."""

    def __init__(self, model: PackedModel, context: StepContext) -> None:
        self._model = model
        self._context = context

    def __call__(self, batch: StepBatch, out: Tensor | None = None) -> Tensor:
        """Logits [rows asked for, vocabulary], in `out` where it is given."""
        model, lora = self._model, batch.lora
        heads = _Heads(batch, self._context, model.layers[0].rotary)
        residual: Tensor = model.embedding(batch.input_ids)
        for index, layer in enumerate(model.layers):
            x = _norm(residual, layer.input_norm, model.eps)
            attended = heads.attend(_project(x, layer.qkv, lora), index, layer.rotary)
            _add_projected_(residual, attended, layer.o, lora)
            x = _norm(residual, layer.post_norm, model.eps)
            acted = _gated(_project(x, layer.gate_up, lora), model.activation)
            _add_projected_(residual, acted, layer.down, lora)
        if batch.rows is not None:
            residual = residual[batch.rows]
        x = _norm(residual, model.norm, model.eps)
        logits = F.linear(x, model.head.weight, model.head.bias)
        if batch.lora_head is not None:
            batch.lora_head.add_(logits, x, model.head.target)
        return logits if out is None else out.copy_(logits)


class _Heads:
    """Rotation, KV store and attention of one step: what it looks up holds for every layer."""

    def __init__(self, batch: StepBatch, context: StepContext, rotary: RotaryLayer) -> None:
        self._context = context
        positions = batch.positions.long()
        cos, sin = rotary.cos[positions][:, None], rotary.sin[positions][:, None]
        dtype = context.key_caches[0].dtype
        self._cos = torch.cat((cos, cos), -1).to(dtype)  # [rows, 1, head_dim]
        self._sin = torch.cat((-sin, sin), -1).to(dtype)
        caches = CacheRows(context.key_caches[0])
        slots = batch.attention.slot_mapping.numpy().astype("int64")
        stored = caches.of(slots[:, None] // caches.block_size, slots[:, None] % caches.block_size)
        self._stored = torch.from_numpy(stored.reshape(-1))
        self._attention = PaddedAttention(batch.attention, caches)

    def attend(self, qkv: Tensor, index: int, rotary: RotaryLayer) -> Tensor:
        """qkv [rows, width] → [rows, heads · head_dim]."""
        keys, values = self._context.key_caches[index], self._context.value_caches[index]
        heads = qkv.unflatten(-1, (-1, rotary.head_dim))
        queries_and_keys, v = heads.split([rotary.num_heads + rotary.num_kv_heads, rotary.num_kv_heads], dim=1)
        if rotary.query_gain is not None:
            queries_and_keys = _normed_heads(queries_and_keys, rotary)
        q, k = self._rotated(queries_and_keys).split([rotary.num_heads, rotary.num_kv_heads], dim=1)
        keys.view(-1, rotary.head_dim).index_copy_(0, self._stored, k.reshape(-1, rotary.head_dim))
        values.view(-1, rotary.head_dim).index_copy_(0, self._stored, v.reshape(-1, rotary.head_dim))
        return self._attention(q, keys, values, scale=rotary.scale, sliding_window=rotary.sliding_window)

    def _rotated(self, heads: Tensor) -> Tensor:
        """[rows, heads, head_dim], halves rotated."""
        a, b = heads.chunk(2, dim=-1)
        return (heads * self._cos).addcmul_(torch.cat((b, a), -1), self._sin)


def _normed_heads(heads: Tensor, rotary: RotaryLayer) -> Tensor:
    assert rotary.query_gain is not None
    assert rotary.key_gain is not None
    q, k = heads.split([rotary.num_heads, rotary.num_kv_heads], dim=1)
    return torch.cat([_norm(q, rotary.query_gain, rotary.eps), _norm(k, rotary.key_gain, rotary.eps)], dim=1)


def _norm(x: Tensor, gain: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, gain.shape, gain, eps)


def _project(x: Tensor, projection: Projection, lora: StepLora | None) -> Tensor:
    out = F.linear(x, projection.weight, projection.bias)
    if lora is not None:
        lora.add_site_(out, x, projection.site)
    return out


def _add_projected_(residual: Tensor, x: Tensor, projection: Projection, lora: StepLora | None) -> None:
    residual.addmm_(x, projection.weight.t())
    if projection.bias is not None:
        residual.add_(projection.bias)
    if lora is not None:
        lora.add_site_(residual, x, projection.site)


def _gated(gate_up: Tensor, activation: Activation) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    acted = F.silu(gate) if activation is Activation.SILU else F.gelu(gate, approximate="tanh")
    return acted.mul_(up)
