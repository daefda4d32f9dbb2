"""The modules of a model that an adapter may touch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class TargetKind(StrEnum):
    """How a module uses its weight."""

    LINEAR = "linear"
    EMBEDDING = "embedding"


@dataclass(frozen=True, slots=True)
class TargetModule:
    """One module, named as in `named_modules()`. An embedding's in_features is the vocabulary size.

    `fan_in_fan_out` is PEFT's word for a linear layer whose weight is stored as [in_features, out_features].
    """

    name: str
    kind: TargetKind
    in_features: int
    out_features: int
    fan_in_fan_out: bool = False
