"""Reading an adapter as PEFT saves it: `adapter_config.json` and `adapter_model.safetensors`.

An adapter is either served exactly as PEFT would run it or refused with the reason: every key of the file must be a
weight of a module that the config targets, every targeted module of the model must have both its weights, and shapes,
ranks and values must be right. Nothing is skipped, padded or guessed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from loramux_worker.adapters.adapter_config import AdapterConfig, read_config_text
from loramux_worker.adapters.adapter_plan import AdapterLimits, AdapterPlans
from loramux_worker.adapters.base_weights import PIECE_ELEMENTS
from loramux_worker.adapters.host_memory import HostMemory, allocate
from loramux_worker.adapters.invalid import AdapterInvalid, quoted
from loramux_worker.adapters.layout import AdapterLayout, OwnTensor
from loramux_worker.adapters.placement import Piece
from loramux_worker.adapters.safetensors_file import TensorEntry, TensorFile
from loramux_worker.adapters.sharing import share
from loramux_worker.adapters.targets import TargetModule

WEIGHTS_FILE = "adapter_model.safetensors"
_HELPERS = 3  # for one adapter
_CHECKED_ELEMENTS = 4 << 20  # by one thread at a time
_PICKLED_WEIGHTS = "adapter_model.bin"


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

    def __init__(self, folder: Path, plans: AdapterPlans) -> None:
        self._limits = plans.limits
        text = read_config_text(folder)
        plans.config(text)  # what is wrong with it is said first
        if os.path.exists(folder / _PICKLED_WEIGHTS) and not os.path.exists(folder / WEIGHTS_FILE):
            raise AdapterInvalid(f"{_PICKLED_WEIGHTS} is a pickle: save the adapter as safetensors")
        self._file = TensorFile(folder, WEIGHTS_FILE)
        try:
            self._plan = plans.plan(text, self._file.header)
        except BaseException:
            self._file.close()
            raise

    @property
    def layout(self) -> AdapterLayout:
        """How it lies in memory."""
        return self._plan.layout

    @property
    def config(self) -> AdapterConfig:
        """What PEFT saved beside it."""
        return self._plan.config

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    @property
    def scalings(self) -> tuple[float, ...]:
        """What B is multiplied with, by module that the adapter touches, in target order."""
        return tuple(source.scaling for source in self._plan.sources)

    def read_into(self, run: Tensor, helpers: Executor | None = None, scratch: HostMemory | None = None) -> None:
        """Read the weights into a run of elements of the served dtype, as `layout` says; B is scaled, then cast.

        Behind them comes the correction, where an adapter is merged into the base weights. `helpers`: threads that may
        take part if they are free. `scratch`: where to take memory from that is needed in between.
        """
        plan, memory = self._plan, scratch or HostMemory()
        self._check_copies()
        for entry, tensor in zip(plan.own, plan.layout.own, strict=True):
            self._read_whole(entry, tensor.view(run).view(-1))

        def read(piece: Piece) -> None:
            piece.read(self._file, memory.allocate(plan.scratch_bytes, torch.uint8), run)

        share(plan.pieces, read, helpers, _HELPERS)
        if (correction := self._limits.correction) is not None:
            share(plan.corrected, lambda module: correction.fill(run, module), helpers, _HELPERS)
        not_finite: list[Tensor] = []

        def look(part: Tensor) -> None:
            if not _is_finite(part):
                not_finite.append(part)

        share(run.split(_CHECKED_ELEMENTS), look, helpers, _HELPERS)
        if not_finite:
            self._name_what_is_not_finite(run)

    def _read_whole(self, entry: TensorEntry, place: Tensor) -> None:
        """A tensor that may be as large as a head, some of it at a time."""
        done = 0
        for values in self._file.read_pieces(entry, PIECE_ELEMENTS):
            place[done : done + len(values)].copy_(values)
            done += len(values)

    def _name_what_is_not_finite(self, run: Tensor) -> None:
        dtype = str(run.dtype).removeprefix("torch.")
        plan = self._plan
        values = [(entry, tensor.view(run)) for entry, tensor in zip(plan.own, plan.layout.own, strict=True)]
        modules = {module.target: module for module in plan.layout.modules}
        for source in plan.sources:
            place = modules[source.target]  # the correction, where it has one, is finite
            values += [(source.a, place.a(run)), (source.b, place.b(run))]
        for entry, placed in values:
            if not _is_finite(placed):
                raise AdapterInvalid(
                    f"{quoted(entry.name)} has NaN or infinite values, or some that are too large for {dtype}"
                )

    def _check_copies(self) -> None:
        for name, entry in self._plan.copies.items():
            weights = self._limits.base_weights
            if weights is None or not weights.equal(name, self._file.read_pieces(entry, PIECE_ELEMENTS)):
                raise AdapterInvalid(
                    f"it brings its own {quoted(name)}, which differs from the served model's: trained or resized "
                    "embeddings are not served"
                )


def read_adapter(folder: Path, targets: Sequence[TargetModule], limits: AdapterLimits) -> AdapterWeights:
    """Read and check a whole adapter; raises as `AdapterFiles` does."""
    with AdapterFiles(folder, AdapterPlans(targets, limits)) as files:
        run = allocate(files.layout.num_elements, limits.dtype, pin=False)
        files.read_into(run)
        places = files.layout.modules
        modules = (ModuleWeights(place.target, place.rank, place.a(run), place.b(run)) for place in places)
        own = tuple((tensor, tensor.view(run)) for tensor in files.layout.own)
        return AdapterWeights(files.layout.rank, tuple(modules), own)


def _is_finite(values: Tensor) -> bool:
    lowest, highest = torch.aminmax(values)  # NaN if there is one; and no tensor of flags, unlike isfinite
    return bool(torch.isfinite(lowest) & torch.isfinite(highest))
