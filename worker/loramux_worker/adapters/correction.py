"""Taking an adapter that was merged into the base weights off again, for all that do not have it.

With M merged, an adapter X runs as X − M: ranks add up, so each module has X's rows of A and of Bᵀ, and behind them M's
with −Bᵀ. To kernels, pool and scheduler that is an adapter like any other; the base model runs with −M alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from loramux_worker.adapters.layout import TRAINED_TOKENS, AdapterLayout, ModuleLayout, OwnTensor
from loramux_worker.adapters.targets import TargetModule


class CorrectedModule(NamedTuple):
    """A module of an adapter whose last rows are the correction's, and where it has them.

    Of an embedding, `token_ids` have vectors of the adapter's own.
    """

    layout: ModuleLayout
    source: ModuleLayout
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Correction:
    """−M for M = `key`, (adapter_id, revision): A and −Bᵀ in the served dtype, in `run` as `layout` says."""

    key: tuple[str, str]
    layout: AdapterLayout
    run: Tensor

    @property
    def rank(self) -> int:
        """The largest rank of any module: by so much the ranks of other adapters grow."""
        return self.layout.rank

    def ranks(
        self, ranks: Mapping[int, int], own: Sequence[OwnTensor], targets: Sequence[TargetModule]
    ) -> dict[int, int]:
        """By target in their order, the ranks of an adapter with `ranks` and `own` once it is corrected.

        Where it brings a weight of its own, the merged one is not used, and nothing is to be taken off.
        """
        replaced = {tensor.module for tensor in own if tensor.parameter == "weight"}
        total = dict(ranks)
        for module in self.layout.modules:
            if targets[module.target].name not in replaced:
                total[module.target] = total.get(module.target, 0) + module.rank
        return dict(sorted(total.items()))

    def places(
        self, ranks: Mapping[int, int], layout: AdapterLayout, targets: Sequence[TargetModule]
    ) -> tuple[CorrectedModule, ...]:
        """The modules of `layout`, of an adapter whose own are `ranks`, that have rows for the correction."""
        sources = {module.target: module for module in self.layout.modules}
        tokens = {tensor.module: tensor.token_ids for tensor in layout.own if tensor.parameter == TRAINED_TOKENS}
        return tuple(
            CorrectedModule(module, sources[module.target], tokens.get(targets[module.target].name, ()))
            for module in layout.modules
            if module.rank > ranks.get(module.target, 0)
        )

    def fill(self, run: Tensor, corrected: CorrectedModule) -> None:
        """Write a module's part of the correction into its rows of an adapter's run."""
        module, source, token_ids = corrected
        a, b = module.a(run)[-source.rank :], module.b(run)[-source.rank :]
        a.copy_(source.a(self.run))
        b.copy_(source.b(self.run))
        if token_ids:
            a[:, list(token_ids)] = 0.0
