"""Linear and embedding layers that add the adapter of each row to the base model's output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from loramux_kernels import LoraTile, lora_add_
from loramux_worker.adapters.targets import TargetKind, TargetModule
from loramux_worker.model.context import LoraPlan, StepContext


class LoraLinear(nn.Linear):
    """An `nn.Linear` that shares the base layer's parameters and adds each row's adapter."""

    def __init__(self, base: nn.Linear, target: int, context: StepContext) -> None:
        nn.Module.__init__(self)  # the parameters exist already: nothing to initialise
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.target = target
        self.context = context

    def plan(self) -> LoraPlan | None:
        """The runs of rows that this layer's input has in the current step."""
        return self.context.lora

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear gives it
        """x [..., in_features] → [..., out_features]; the leading axes are the rows of the packed batch."""
        out = F.linear(input, self.weight, self.bias)
        plan = self.plan()
        if plan is not None and plan[self.target]:
            lora_add_(out.view(-1, self.out_features), input.reshape(-1, self.in_features), plan[self.target])
        return out


class LoraHead(LoraLinear):
    """The output head: it sees only the rows whose logits are asked for."""

    def plan(self) -> LoraPlan | None:
        """The runs among the rows whose logits are asked for."""
        return self.context.lora_head


class LoraEmbedding(nn.Module):
    """An embedding that adds Aᵀ[ids] · Bᵀ of each row's adapter. Keeps the base layer, which may scale its output."""

    def __init__(self, base: nn.Embedding, target: int, context: StepContext) -> None:
        super().__init__()
        self.base = base
        self.target = target
        self.context = context
        scale = getattr(base, "embed_scale", None)  # Gemma scales inside its embedding, and PEFT's delta with it
        self.scale = scale

    @property
    def weight(self) -> Tensor:
        """The base table, which a tied head shares."""
        return self.base.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        """ids [1, T] → [1, T, dim]."""
        out: Tensor = self.base(input_ids)
        plan = self.context.lora
        if plan is not None and plan[self.target]:
            ids, rows = input_ids.view(-1), out.view(-1, out.shape[-1])
            for start, end, a, b in plan[self.target]:
                delta = a[:, ids[start:end]].t() @ b
                rows[start:end] += delta if self.scale is None else delta * self.scale.to(delta.dtype)
        return out


def add_lora_layers(model: nn.Module, context: StepContext) -> tuple[TargetModule, ...]:
    """Replace every linear and the token embedding of `model`; returns the targets in their order.

    The order is the order of the modules, so that siblings (q, k, v; gate, up) follow one another. PEFT names modules
    as `named_modules` does, and so do the targets.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    targets: list[TargetModule] = []
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            layer = LoraHead if module is head else LoraLinear
            replacement: nn.Module = layer(module, len(targets), context)
            kind, shape = TargetKind.LINEAR, (module.in_features, module.out_features)
        elif module is embedding and isinstance(module, nn.Embedding):
            replacement = LoraEmbedding(module, len(targets), context)
            kind, shape = TargetKind.EMBEDDING, (module.num_embeddings, module.embedding_dim)
        else:
            continue
        targets.append(TargetModule(name, kind, *shape))
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, replacement)
    return tuple(targets)


class AdapterRun(NamedTuple):
    """Rows `start` to `end` (exclusive) of a batch that have one adapter, and its tiles by target module."""

    start: int
    end: int
    tiles: Sequence[tuple[Tensor, Tensor] | None]


def lora_plan(num_targets: int, runs: list[AdapterRun]) -> LoraPlan | None:
    """The LoRA work of one step, by target module; None when no row has an adapter."""
    if not runs:
        return None
    plan: list[list[LoraTile]] = [[] for _ in range(num_targets)]
    for start, end, tiles in runs:
        for target, tile in enumerate(tiles):
            if tile is not None:
                plan[target].append(LoraTile(start, end, *tile))
    return tuple(tuple(runs_of_target) for runs_of_target in plan)
