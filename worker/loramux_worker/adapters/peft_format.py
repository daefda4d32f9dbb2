"""Reading an adapter as PEFT saves it: `adapter_config.json` and `adapter_model.safetensors`.

An adapter is either served exactly as PEFT would run it or refused with the reason: every key of the file must be a
weight of a module that the config targets, every targeted module of the model must have both its weights, and shapes,
ranks and values must be right. Nothing is skipped, padded or guessed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from loramux_worker.adapters.adapter_config import read_config
from loramux_worker.adapters.base_model_name import is_other_model
from loramux_worker.adapters.base_weights import PIECE_ELEMENTS, BaseWeights
from loramux_worker.adapters.host_memory import allocate
from loramux_worker.adapters.invalid import AdapterInvalid, quoted
from loramux_worker.adapters.layout import AdapterLayout, OwnTensor
from loramux_worker.adapters.peft_keys import match_to_config, sort_keys
from loramux_worker.adapters.safetensors_file import TensorEntry, TensorFile, consecutive
from loramux_worker.adapters.targets import TargetModule

WEIGHTS_FILE = "adapter_model.safetensors"
_PIECE_BYTES = 4 << 20  # what a core's cache holds
_PICKLED_WEIGHTS = "adapter_model.bin"


@dataclass(frozen=True, slots=True)
class AdapterLimits:
    """What the engine takes.

    `max_rank` of any one module; weights are cast to `dtype`. `base_model_name` is the served model's hub id, None
    to check no name (see `base_model_name.py` for what counts as another model). `base_weights` recognises copies of
    the base model's embedding and head; without it an adapter that brings such copies is refused. `parameters` are
    the shapes of all of the model's, by name, and an adapter may bring its own in place of the `replaceable` ones.
    """

    max_rank: int
    dtype: torch.dtype
    base_model_name: str | None = None
    base_weights: BaseWeights | None = None
    parameters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    replaceable: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, eq=False)
class ModuleWeights:
    """One module's part of an adapter: `a` [rank, in], `b` [rank, out] = Bᵀ times the scaling, in the served dtype.

    The module's output grows by x·aᵀ·b. For an embedding `a` is [rank, vocabulary] and x·aᵀ its columns.
    """

    target: int
    rank: int
    a: Tensor
    b: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AdapterWeights:
    """An adapter in memory, its modules in target order. `rank` is the largest of any module."""

    rank: int
    modules: tuple[ModuleWeights, ...]
    own: tuple[tuple[OwnTensor, Tensor], ...] = ()


class AdapterFiles:
    """An adapter folder, open and checked up to the values of its weights. Use as a context manager.

    `layout` says how much memory the adapter takes, before any weight is read; `config` is what PEFT saved beside it.

    Raises:
        AdapterInvalid: whatever is wrong with the files; nothing else, whatever the bytes in them are.
        RequestFailed: `adapter_unavailable`, when the disk fails.
    """

    def __init__(self, folder: Path, targets: Sequence[TargetModule], limits: AdapterLimits) -> None:
        self._limits = limits
        config = self.config = read_config(folder)
        if is_other_model(config.base_model_name, limits.base_model_name):
            raise AdapterInvalid(
                f"it was made for the model {quoted(config.base_model_name)}, "
                f"served is {quoted(limits.base_model_name)}"
            )
        if os.path.exists(folder / _PICKLED_WEIGHTS) and not os.path.exists(folder / WEIGHTS_FILE):
            raise AdapterInvalid(f"{_PICKLED_WEIGHTS} is a pickle: save the adapter as safetensors")
        self._file = TensorFile(folder, WEIGHTS_FILE)
        try:
            found = sort_keys(self._file.entries, targets, config, limits.base_weights, limits.parameters)
            self._sources, self._own = match_to_config(
                found, config, targets, limits.max_rank, limits.parameters, limits.replaceable
            )
            self._copies = found.copies
        except BaseException:
            self._file.close()
            raise
        own = [tensor for tensor, _ in self._own]
        self.layout = AdapterLayout.plan([(s.target, s.a.shape[0]) for s in self._sources], targets, own)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def scalings(self) -> tuple[float, ...]:
        """What B is multiplied with, module by module of `layout`."""
        return tuple(source.scaling for source in self._sources)

    def read_into(self, run: Tensor) -> None:
        """Read the weights into a run of elements of the served dtype, as `layout` says; B is scaled before the cast.

        Some megabytes at a time, each piece with a handful of calls: loads run beside the engine's thread, and every
        call that lets go of the interpreter and takes it again is one that the others may wait for.
        """
        self._check_copies()
        places: dict[str, tuple[Tensor, float | None]] = {}
        for source, place in zip(self._sources, self.layout.modules, strict=True):
            places[source.a.name] = place.a(run), None
            places[source.b.name] = place.b(run), source.scaling
        for (_, entry), tensor in zip(self._own, self.layout.own, strict=True):
            self._read_whole(entry, tensor.view(run).view(-1))
        entries = sorted((self._file.entries[name] for name in places), key=lambda entry: entry.offset)
        pieces = list(consecutive(entries, _PIECE_BYTES))
        scratch = allocate(max(end - start for start, end, _ in pieces), torch.uint8, pin=False)
        for start, end, piece in pieces:
            self._file.read_bytes(scratch[: end - start], start)
            _place_tensors([(e.view(scratch, start), *places[e.name]) for e in piece])
        if not _is_finite(run):
            self._name_what_is_not_finite(run)

    def _read_whole(self, entry: TensorEntry, place: Tensor) -> None:
        """A tensor that may be as large as a head, some of it at a time."""
        done = 0
        for values in self._file.read_pieces(entry, PIECE_ELEMENTS):
            place[done : done + len(values)].copy_(values)
            done += len(values)

    def _name_what_is_not_finite(self, run: Tensor) -> None:
        dtype = str(run.dtype).removeprefix("torch.")
        values = [(entry, tensor.view(run)) for (_, entry), tensor in zip(self._own, self.layout.own, strict=True)]
        for source, place in zip(self._sources, self.layout.modules, strict=True):
            values += [(source.a, place.a(run)), (source.b, place.b(run))]
        for entry, placed in values:
            if not _is_finite(placed):
                raise AdapterInvalid(
                    f"{quoted(entry.name)} has NaN or infinite values, or some that are too large for {dtype}"
                )

    def _check_copies(self) -> None:
        for name, entry in self._copies.items():
            weights = self._limits.base_weights
            if weights is None or not weights.equal(name, self._file.read_pieces(entry, PIECE_ELEMENTS)):
                raise AdapterInvalid(
                    f"it brings its own {quoted(name)}, which differs from the served model's: trained or resized "
                    "embeddings are not served"
                )


def read_adapter(folder: Path, targets: Sequence[TargetModule], limits: AdapterLimits) -> AdapterWeights:
    """Read and check a whole adapter; raises as `AdapterFiles` does."""
    with AdapterFiles(folder, targets, limits) as files:
        run = allocate(files.layout.num_elements, limits.dtype, pin=False)
        files.read_into(run)
        places = files.layout.modules
        modules = (ModuleWeights(place.target, place.rank, place.a(run), place.b(run)) for place in places)
        own = tuple((tensor, tensor.view(run)) for tensor in files.layout.own)
        return AdapterWeights(files.layout.rank, tuple(modules), own)


def _place_tensors(tensors: Sequence[tuple[Tensor, Tensor, float | None]]) -> None:
    """Copy what has no scaling to its place, and each B scaled and transposed; what is copied is overwritten."""
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    scaled: list[Tensor] = []
    scalings: list[float] = []
    for tensor, place, scaling in tensors:
        values = tensor
        if scaling is not None:
            if scaling != 1.0:
                if tensor.dtype != place.dtype or not _is_exact(scaling):
                    values = tensor.float()  # torch rounds the scaling to what it multiplies
                scaled.append(values)
                scalings.append(scaling)
            values = values.t()
        targets.append(place)
        sources.append(values)
    if scaled:
        torch._foreach_mul_(scaled, scalings)
    torch._foreach_copy_(targets, sources)


def _is_exact(scaling: float) -> bool:
    """Whether a product with it in any float dtype is the same as one in float32 that is rounded: a power of two."""
    return math.frexp(scaling)[0] == 0.5 and 2.0**-14 <= scaling <= 2.0**15


def _is_finite(values: Tensor) -> bool:
    lowest, highest = torch.aminmax(values)  # NaN if there is one; and no tensor of flags, unlike isfinite
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))
