"""Merge one adapter into the weights of a loaded model: `--merge-adapter`.

A weight W becomes W + Bᵀ·A, computed in float32 and rounded once to the served dtype. A and B are those that the
adapter would run with beside the base model, rounded to that dtype, so that the correction of all others takes off
exactly what was added: what remains of it is the rounding of W.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loramux_worker.adapters.adapter_plan import AdapterLimits, AdapterPlans
from loramux_worker.adapters.correction import Correction
from loramux_worker.adapters.host_memory import allocate
from loramux_worker.adapters.invalid import AdapterInvalid
from loramux_worker.adapters.layout import AdapterLayout
from loramux_worker.adapters.peft_format import AdapterFiles
from loramux_worker.engine.protocol import AdapterReference
from loramux_worker.errors import ConfigurationError, RequestFailed
from loramux_worker.model.loader import ServedModel
from loramux_worker.model.merge import PIECE_ELEMENTS, Change, add_product


@torch.no_grad()
def merge_in_place(model: ServedModel, reference: AdapterReference, limits: AdapterLimits) -> Correction:
    """Merge the adapter into the model's weights, some rows at a time; returns what takes it off again.

    Raises:
        ConfigurationError: the adapter cannot be served, or not merged so that all others stay exact.
    """
    flag = f"--merge-adapter {reference.adapter_id}"
    try:
        layout, run = _read(model, reference, limits)
        _refuse_ties(model, layout)
    except RequestFailed as error:
        raise ConfigurationError(f"{flag}: {error}") from error
    if limits.base_weights is not None and {module.target for module in layout.modules} & {*model.edge_targets}:
        limits.base_weights.remember()  # other adapters bring copies of these as they were
    for module in layout.modules:
        target, b = model.targets[module.target], module.b(run)
        weight: Tensor = _module(model, module.target).weight
        add = add_product(target, *(part.to(weight.device).float() for part in (module.a(run), b)))
        if not _change_(weight, add):
            dtype = str(weight.dtype).removeprefix("torch.")
            raise ConfigurationError(f"{flag}: {target.name} gets values too large for {dtype}: say --dtype bfloat16")
        b.neg_()
    return Correction(reference.key, layout, run)


def _read(model: ServedModel, reference: AdapterReference, limits: AdapterLimits) -> tuple[AdapterLayout, Tensor]:
    with AdapterFiles(Path(reference.path), AdapterPlans(model.targets, limits)) as files:
        layout = files.layout
        if layout.own:
            kind = "it is a DoRA" if files.config.use_dora else f"it brings more than LoRA for {layout.own[0].module}"
            raise AdapterInvalid(f"{kind}: merged, it could not be taken off again for the others; serve it unmerged")
        run = allocate(layout.num_elements, limits.dtype, pin=False)
        files.read_into(run)
        return layout, run


def _refuse_ties(model: ServedModel, layout: AdapterLayout) -> None:
    edges = [_module(model, target) for target in model.edge_targets]
    if edges[0].weight is not edges[1].weight:
        return
    for module in layout.modules:
        if module.target in model.edge_targets:
            raise AdapterInvalid(
                f"it touches {model.targets[module.target].name}, whose weights this model shares between embedding "
                "and output head: merged, it would change both; serve it unmerged"
            )


def _module(model: ServedModel, target: int) -> Any:
    return model.module.get_submodule(model.targets[target].name)


def _change_(weight: Tensor, change: Change) -> bool:
    """Whether all of what the weight has become is finite."""
    rows_at_once = max(1, PIECE_ELEMENTS // weight.shape[1])
    finite = True
    for first in range(0, weight.shape[0], rows_at_once):
        rows = weight[first : first + rows_at_once]
        rows.copy_(change(rows.float(), first))
        finite &= bool(torch.isfinite(torch.stack(torch.aminmax(rows))).all())
    return finite
