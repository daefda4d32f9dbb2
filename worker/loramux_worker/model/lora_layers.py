"""Linear and embedding layers that add the adapter of each row to the base model's output."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loramux_worker.adapters.targets import TargetKind, TargetModule
from loramux_worker.model.context import OwnRun, StepContext, StepLora
from loramux_worker.model.own_layers import (
    own_vectors,
    replace_linear_,
    replace_tied_tokens_,
    scale_linear_,
    scale_vectors_,
)


class LoraLinear(nn.Linear):
    """An `nn.Linear` that shares the base layer's parameters and adds each row's adapter."""

    fan_in_fan_out = False

    def __init__(self, base: nn.Linear | Conv1D, name: str, target: int, context: StepContext) -> None:
        nn.Module.__init__(self)  # the parameters exist already: nothing to initialise
        self.name = name
        self.weight, self.bias = base.weight, base.bias
        self.out_features, self.in_features = self.matrix(base.weight).shape
        self.target = target
        self.context = context

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight of this layer's, however such are stored, as [out_features, in_features]."""
        return weight.t() if self.fan_in_fan_out else weight

    def lora(self) -> StepLora | None:
        """The adapters of this layer's rows in the current batch."""
        batch = self.context.batch
        return None if batch is None else batch.lora

    def own(self) -> Sequence[OwnRun]:
        """The runs of this layer's rows whose adapter has more than LoRA."""
        batch = self.context.batch
        return () if batch is None else batch.own

    def replace_(self, rows: Tensor, x: Tensor, run: OwnRun) -> None:
        """Compute a run's rows again with what its adapter has in place of this layer's parameters."""
        replace_linear_(rows, x, self, run)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - the name that nn.Linear gives it
        """x [..., in_features] → [..., out_features]; the leading axes are the rows of the packed batch."""
        out = F.linear(input, self.matrix(self.weight), self.bias)
        rows, x, own = out.view(-1, self.out_features), input.reshape(-1, self.in_features), self.own()
        for run in own:
            self.replace_(rows, x, run)
        if (lora := self.lora()) is not None:
            lora.add_(rows, x, self.target)
        for run in own:
            scale_linear_(rows, self, run)
        return out


class LoraConv1D(LoraLinear):
    """The same of GPT-2's `Conv1D`, a linear layer whose weight is stored as [in_features, out_features]."""

    fan_in_fan_out = True


class LoraHead(LoraLinear):
    """The output head: it sees only the rows whose logits are asked for."""

    tied_to: str | None = None  # the embedding whose table it shares

    def replace_(self, rows: Tensor, x: Tensor, run: OwnRun) -> None:
        """Tokens whose vectors in the tied embedding are the adapter's have them here too."""
        super().replace_(rows, x, run)
        if self.tied_to is not None:
            replace_tied_tokens_(rows, x, self, self.tied_to, run)

    def lora(self) -> StepLora | None:
        """The adapters of the rows whose logits are asked for."""
        batch = self.context.batch
        return None if batch is None else batch.lora_head

    def own(self) -> Sequence[OwnRun]:
        """The runs of the rows whose logits are asked for."""
        batch = self.context.batch
        return () if batch is None else batch.own_head


class LoraEmbedding(nn.Module):
    """An embedding that adds Aᵀ[ids] · Bᵀ of each row's adapter. Keeps the base layer, which may scale its output."""

    def __init__(self, base: nn.Embedding, name: str, target: int, context: StepContext) -> None:
        super().__init__()
        self.base = base
        self.name = name
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
        batch = self.context.batch
        if batch is None:
            return out
        ids, rows = input_ids.view(-1), out.view(-1, out.shape[-1])
        for run in batch.own:
            vectors = own_vectors(ids[run.start : run.end], self.weight, self.name, run)
            if vectors is not None:
                rows[run.start : run.end] = vectors if self.scale is None else vectors * self.scale.to(vectors.dtype)
        if batch.lora_embedding:
            for start, end, a, b in batch.lora_embedding:
                delta = a[:, ids[start:end]].t() @ b
                rows[start:end] += delta if self.scale is None else delta * self.scale.to(delta.dtype)
        for run in batch.own:
            scale_vectors_(rows, self, run)
        return out


_LINEARS: dict[type, type[LoraLinear]] = {nn.Linear: LoraLinear, Conv1D: LoraConv1D}


def add_lora_layers(model: nn.Module, context: StepContext) -> tuple[TargetModule, ...]:
    """Replace every linear and the token embedding of `model`; returns the targets in their order.

    The order is the order of the modules, so that siblings (q, k, v; gate, up) follow one another. PEFT names modules
    as `named_modules` does, and so do the targets.
    """
    head = model.get_output_embeddings()  # type: ignore[operator]
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    targets: list[TargetModule] = []
    named = list(model.named_modules())
    for name, module in named:
        replacement: LoraLinear | LoraEmbedding
        if (layer := _LINEARS.get(type(module))) is not None:
            layer = LoraHead if module is head else layer
            replacement = layer(module, name, len(targets), context)
            shape = (replacement.in_features, replacement.out_features)
            targets.append(TargetModule(name, TargetKind.LINEAR, *shape, layer.fan_in_fan_out))
        elif module is embedding and isinstance(module, nn.Embedding):
            replacement = LoraEmbedding(module, name, len(targets), context)
            shape = (module.num_embeddings, module.embedding_dim)
            targets.append(TargetModule(name, TargetKind.EMBEDDING, *shape))
        else:
            continue
        if isinstance(replacement, LoraHead) and module.weight is embedding.weight:
            replacement.tied_to = next(other for other, each in named if each is embedding)
        parent, _, attribute = name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, replacement)
    return tuple(targets)
