"""A decoder of the Llama shape as a short list of ops, for GPUs.

    add + norm → q, k, v → rotate, store, attend → o → add + norm → act(gate) ⊙ up → down

Every product has its adapters beside it.
"""

from __future__ import annotations

from torch import Tensor

from loramux_kernels import (
    RotaryLayer,
    SplitCounters,
    add_rms_norm,
    decode_attention,
    gated_linear,
    linear,
    paged_attention,
    rotate_and_store,
)
from loramux_worker.model.context import StepBatch, StepContext, StepLora
from loramux_worker.model.packed import PackedModel, Projection


class FusedDecoder:
    """The whole model; the context holds the paged cache."""

    def __init__(self, model: PackedModel, context: StepContext) -> None:
        self._model = model
        self._context = context
        self._counters = SplitCounters.make(model.layers[0].rotary.num_kv_heads, model.norm.device)

    def __call__(self, batch: StepBatch, out: Tensor | None = None) -> Tensor:
        """Logits [rows asked for, vocabulary], in `out` where it is given."""
        model, lora, partials = self._model, batch.lora, None
        residual: Tensor = model.embedding(batch.input_ids)
        for index, layer in enumerate(model.layers):
            residual, x = add_rms_norm(residual, partials, layer.input_norm, model.eps)
            attended = self._attend(_project(x, layer.qkv, lora), index, layer.rotary, batch)
            partials = _project(attended, layer.o, lora)
            residual, x = add_rms_norm(residual, partials, layer.post_norm, model.eps)
            partials = _project(self._gate_up(x, layer.gate_up, lora), layer.down, lora)
        _, x = add_rms_norm(residual, partials, model.norm, model.eps)
        if batch.rows is not None:
            x = x[batch.rows]
        if out is None:  # given a place, the product comes in one piece
            out = x.new_empty(x.shape[0], model.head.weight.shape[0])
        linear(x, model.head.weight, model.head.bias, out=out)
        if batch.lora_head is not None:
            batch.lora_head.add_(out, x, model.head.target)
        return out

    def _gate_up(self, x: Tensor, projection: Projection, lora: StepLora | None) -> Tensor:
        """x [rows, hidden] → act(gate) ⊙ up [rows, intermediate]."""
        weight, bias = projection.weight, projection.bias
        if lora is None:
            return gated_linear(x, weight, self._model.activation, bias)
        return lora.gated_linear(x, weight, bias, projection.site, self._model.activation)

    def _attend(self, qkv: Tensor, index: int, rotary: RotaryLayer, batch: StepBatch) -> Tensor:
        """qkv [pieces, rows, width] → [rows, heads · head_dim]."""
        keys, values = self._context.key_caches[index], self._context.value_caches[index]
        attention = batch.attention
        if attention.most_query_tokens == 1:
            return decode_attention(qkv, batch.positions, rotary, keys, values, attention, self._counters)
        queries = rotate_and_store(qkv, batch.positions, rotary, keys, values, attention.slot_mapping)
        attended = paged_attention(
            queries, keys, values, attention, scale=rotary.scale, sliding_window=rotary.sliding_window
        )
        return attended.flatten(1)


def _project(x: Tensor, projection: Projection, lora: StepLora | None) -> Tensor:
    """x [rows, in_features] → [pieces, rows, out_features]."""
    delta = None if lora is None else lora.delta(x, projection.site)
    return linear(x, projection.weight, projection.bias, delta)
