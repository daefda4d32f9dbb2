"""What an adapter has beside A and B: parameters in place of the model's, DoRA's magnitudes, vectors of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from loramux_worker.adapters.layout import MAGNITUDE, TRAINED_TOKENS, OwnTensor

_ELEMENTS_AT_ONCE = 1 << 24
_NOTHING: Mapping[str, Tensor] = {}


class TrainedTokens(NamedTuple):
    """Vectors [n, dim] that stand in an embedding in place of those of `token_ids`, int64 [n], in their order.

    `ascending` has the ids in rising order, int64 [n], and `order` which vector belongs to each.
    """

    token_ids: Tensor
    vectors: Tensor
    ascending: Tensor
    order: Tensor

    def look_up(self, ids: Tensor, vectors: Tensor) -> Tensor:
        """`vectors` [rows, dim] of `ids` [rows], with these in place of those of the trained tokens."""
        places = torch.searchsorted(self.ascending, ids).clamp_(max=len(self.ascending) - 1)
        is_trained = self.ascending[places] == ids
        return torch.where(is_trained[:, None], self.vectors[self.order[places]], vectors)


class OwnWeights:
    """Views of one adapter's tensors, by module. Valid as long as the adapter lies where it does.

    `scales`, which outlive that, has DoRA's scales that were computed.
    """

    def __init__(self, tensors: tuple[OwnTensor, ...], run: Tensor, scales: dict[str, Tensor]) -> None:
        self._parameters: dict[str, dict[str, Tensor]] = {}
        self._magnitudes: dict[str, Tensor] = {}
        self._scales = scales
        self._tokens: dict[str, TrainedTokens] = {}
        for tensor in tensors:
            if tensor.parameter == MAGNITUDE:
                self._magnitudes[tensor.module] = tensor.view(run)
            elif tensor.parameter == TRAINED_TOKENS:
                token_ids = torch.tensor(tensor.token_ids, device=run.device)
                ascending, order = token_ids.sort()
                self._tokens[tensor.module] = TrainedTokens(token_ids, tensor.view(run), ascending, order)
            else:
                self._parameters.setdefault(tensor.module, {})[tensor.parameter] = tensor.view(run)

    def parameters(self, module: str) -> Mapping[str, Tensor]:
        """By their names in the module, the parameters that stand in place of the model's."""
        return self._parameters.get(module, _NOTHING)

    def trained_tokens(self, module: str) -> TrainedTokens | None:
        """The single vectors of an embedding, which a head that is tied to it has too."""
        return self._tokens.get(module)

    def scale(self, module: str, weight: Tensor, a: Tensor, b: Tensor) -> Tensor | None:
        """What DoRA multiplies the outputs of a module with, bias aside: [out_features]; None where there is no DoRA.

        Args:
            weight: the model's [out_features, in_features]; of an embedding that is [dim, tokens].
            a: [rank, in_features]; b: [rank, out_features], scaled.
        """
        magnitude = self._magnitudes.get(module)
        if magnitude is None:
            return None
        if module not in self._scales:
            self._scales[module] = magnitude / dora_norms(weight, a, b)
        return self._scales[module]


def dora_norms(weight: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Norms of the rows of W + Bᵀ·A, [out_features] in W's dtype (Liu et al., "DoRA", ICML 2024, section 4.1)."""
    rows_at_once = max(1, _ELEMENTS_AT_ONCE // weight.shape[1])
    norms = [
        torch.linalg.norm(rows.float() + part.float().t() @ a.float(), dim=1)
        for rows, part in zip(weight.split(rows_at_once), b.split(rows_at_once, dim=1), strict=True)
    ]
    return torch.cat(norms).to(weight.dtype)
