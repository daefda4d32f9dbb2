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
    """One module, named as in `named_modules()`. An embedding's in_features is the vocabulary size."""

    name: str
    kind: TargetKind
    in_features: int
    out_features: int
