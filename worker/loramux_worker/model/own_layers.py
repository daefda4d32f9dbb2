"""Layers of which some rows' adapters bring their own parameters, and DoRA's scaling of a layer's outputs.

Such rows run through the Hugging Face modules, run by run: right beside any other adapters, and slower than LoRA.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from loramux_worker.model.context import OwnRun, StepContext

if TYPE_CHECKING:
    from loramux_worker.model.lora_layers import LoraEmbedding, LoraLinear


def replace_linear_(out: Tensor, x: Tensor, layer: LoraLinear, run: OwnRun) -> None:
    """Compute a run's rows of out [rows, out_features] again where its adapter has its own weight or bias."""
    if own := run.own.parameters(layer.name):
        weight, bias = own.get("weight", layer.weight), own.get("bias", layer.bias)
        out[run.start : run.end] = F.linear(x[run.start : run.end], layer.matrix(weight), bias)


def replace_tied_tokens_(out: Tensor, x: Tensor, layer: LoraLinear, embedding: str, run: OwnRun) -> None:
    """The logits of tokens whose vectors in the tied embedding are the adapter's."""
    if (trained := run.own.trained_tokens(embedding)) is not None:
        bias = run.own.parameters(layer.name).get("bias", layer.bias)
        logits = F.linear(x[run.start : run.end], trained.vectors, None if bias is None else bias[trained.token_ids])
        out[run.start : run.end].index_copy_(1, trained.token_ids, logits)


def own_vectors(ids: Tensor, weight: Tensor, name: str, run: OwnRun) -> Tensor | None:
    """What the embedding gives for a run's ids [n], unscaled, where its adapter has vectors of its own; else None."""
    own, trained = run.own.parameters(name).get("weight"), run.own.trained_tokens(name)
    if own is None and trained is None:
        return None
    vectors = F.embedding(ids, weight if own is None else own)
    return vectors if trained is None else trained.look_up(ids, vectors)


def scale_linear_(out: Tensor, layer: LoraLinear, run: OwnRun) -> None:
    """Scale a run's rows of out [rows, out_features], LoRA included and bias not, where its adapter is a DoRA."""
    if (scale := _dora_scale(layer.name, layer.target, layer.matrix(layer.weight), run)) is None:
        return
    rows, bias = out[run.start : run.end], run.own.parameters(layer.name).get("bias", layer.bias)
    if bias is not None:
        rows -= bias
    rows *= scale
    if bias is not None:
        rows += bias


def scale_vectors_(out: Tensor, layer: LoraEmbedding, run: OwnRun) -> None:
    """Scale a run's vectors out [rows, dim], LoRA included, where its adapter is a DoRA."""
    if (scale := _dora_scale(layer.name, layer.target, layer.weight.t(), run)) is not None:
        out[run.start : run.end] *= scale


def _dora_scale(name: str, target: int, weight: Tensor, run: OwnRun) -> Tensor | None:
    tile = run.tiles[target]
    return None if tile is None else run.own.scale(name, weight, *tile)


def add_own_parameters(model: nn.Module, context: StepContext) -> None:
    """Have every other layer with parameters (norms above all) use an adapter's own for its rows."""
    served = [module for module in model.modules() if hasattr(module, "target")]  # these see to it themselves
    others = {*served, *(module.base for module in served if hasattr(module, "base"))}
    for name, module in model.named_modules():
        if module._parameters and module not in others:
            module.register_forward_hook(_hook(name, context))


def _hook(name: str, context: StepContext) -> Any:
    def compute_own_rows(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
        """x [1, T, …] → out [1, T, …]: the rows of the packed batch lie along the second axis."""
        for run in () if context.batch is None else context.batch.own:
            if own := run.own.parameters(name):
                kept = dict(module._parameters)
                module._parameters.update(own)  # type: ignore[arg-type]
                try:
                    out[:, run.start : run.end] = module.forward(args[0][:, run.start : run.end], *args[1:])
                finally:
                    module._parameters.update(kept)

    return compute_own_rows
