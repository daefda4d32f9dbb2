"""What config and header of an adapter come to: checked against the model, and where every weight goes.

The adapters of a fleet mostly differ in nothing but the values of their weights. Reading and checking a header of some
hundred tensors takes milliseconds of Python, while which no step is prepared and no other load goes on: so it is done
once for those that share it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from loramux_worker.adapters.adapter_config import AdapterConfig, parse_config
from loramux_worker.adapters.base_model_name import is_other_model
from loramux_worker.adapters.base_weights import BaseWeights
from loramux_worker.adapters.correction import CorrectedModule, Correction
from loramux_worker.adapters.invalid import AdapterInvalid, quoted
from loramux_worker.adapters.layout import AdapterLayout
from loramux_worker.adapters.peft_keys import Source, match_to_config, sort_keys
from loramux_worker.adapters.placement import Piece, Place, plan_pieces
from loramux_worker.adapters.safetensors_file import TensorEntry, TensorHeader
from loramux_worker.adapters.targets import TargetModule

_REMEMBERED = 16
_MOST_REMEMBERED_BYTES = 1 << 20  # of a header or a config


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """What the engine takes.

    `max_rank` of any one module; weights are cast to `dtype`. `base_model_name` is the served model's hub id, None
    to check no name (see `base_model_name.py` for what counts as another model). `base_weights` recognises copies of
    the base model's embedding and head; without it an adapter that brings such copies is refused. `parameters` are
    the shapes of all of the model's, by name, and an adapter may bring its own in place of the `replaceable` ones.
    `correction`, where an adapter is merged into the base weights, is laid out and read behind every other.
    """

    max_rank: int
    dtype: torch.dtype
    base_model_name: str | None = None
    base_weights: BaseWeights | None = None
    parameters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    replaceable: frozenset[str] = frozenset()
    correction: Correction | None = None


@dataclass(frozen=True, slots=True, eq=False)
class AdapterPlan:
    """An adapter but for its values: `pieces` bring A and B into a run that `layout` describes.

    `own` are the file's tensors that `layout.own` has places for, in its order; `copies` those that must equal the base
    model's, by the parameter's name. `corrected` are the modules that get something of the limits' correction, be it
    that the adapter itself touches them or not.
    """

    config: AdapterConfig
    layout: AdapterLayout
    sources: tuple[Source, ...]  # in target order
    pieces: tuple[Piece, ...]
    own: tuple[TensorEntry, ...]
    copies: Mapping[str, TensorEntry]
    corrected: tuple[CorrectedModule, ...] = ()

    @property
    def scratch_bytes(self) -> int:
        """What any piece needs: of one size, they can have one another's memory."""
        return max((piece.scratch_bytes for piece in self.pieces), default=0) or 1


class AdapterPlans:
    """Plans for one model's adapters. Thread-safe."""

    def __init__(self, targets: Sequence[TargetModule], limits: AdapterLimits) -> None:
        self.limits = limits
        self._targets = tuple(targets)
        self._remember: Callable[[bytes, TensorHeader], AdapterPlan] = lru_cache(_REMEMBERED)(self._make)
        self._remember_config = lru_cache(_REMEMBERED)(self._check_config)

    def config(self, text: bytes) -> AdapterConfig:
        """What `adapter_config.json` says. Raises AdapterInvalid: it is wrong, or for another model."""
        check = self._remember_config if len(text) <= _MOST_REMEMBERED_BYTES else self._check_config
        return check(text)

    def plan(self, config: bytes, header: TensorHeader) -> AdapterPlan:
        """Raises AdapterInvalid: the two do not fit each other or the model."""
        small = max(len(config), len(header.text)) <= _MOST_REMEMBERED_BYTES
        return (self._remember if small else self._make)(config, header)

    def _check_config(self, text: bytes) -> AdapterConfig:
        config, served = parse_config(text), self.limits.base_model_name
        if is_other_model(config.base_model_name, served):
            raise AdapterInvalid(
                f"it was made for the model {quoted(config.base_model_name)}, served is {quoted(served)}"
            )
        return config

    def _make(self, text: bytes, header: TensorHeader) -> AdapterPlan:
        config, limits = self.config(text), self.limits
        found = sort_keys(header.entries(), self._targets, config, limits.base_weights, limits.parameters)
        sources, own = match_to_config(
            found, config, self._targets, limits.max_rank, limits.parameters, limits.replaceable
        )
        ranks, tensors = {source.target: source.a.shape[0] for source in sources}, [tensor for tensor, _ in own]
        total = ranks if limits.correction is None else limits.correction.ranks(ranks, tensors, self._targets)
        layout = AdapterLayout.plan(total.items(), self._targets, tensors)
        modules = {module.target: module for module in layout.modules}
        places = []
        for source in sources:  # its rows are a module's first: a tile's rows follow one another
            module = modules[source.target]
            places += [Place(source.a, module.a_offset), Place(source.b, module.b_offset, source.scaling)]
        return AdapterPlan(
            config,
            layout,
            tuple(sources),
            plan_pieces(places, limits.dtype),
            tuple(entry for _, entry in own),
            found.copies,
            () if limits.correction is None else limits.correction.places(ranks, layout, self._targets),
        )
