"""Bake one adapter into a copy of the base model, a few rows at a time.

Every file of the copy has the name and the tensors of its original. A weight W [out, in] of a module that the adapter
touches becomes W + Bᵀ·A, with DoRA's magnitudes as the norms of its rows, computed in float32 and rounded once; one
that is stored as [in, out] is read twice for a DoRA, whose norms are then those of columns. What the adapter has of its
own takes the place of the model's; everything else is copied as it is.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from loramux_worker.adapters.layout import MAGNITUDE, TRAINED_TOKENS
from loramux_worker.adapters.peft_format import AdapterWeights, ModuleWeights
from loramux_worker.adapters.targets import TargetKind, TargetModule
from loramux_worker.errors import ConfigurationError
from loramux_worker.model.checkpoint import FLOATS, INDEX_FILE, Shard, StoredTensor
from loramux_worker.model.skeleton import ModelSkeleton

PIECE_ELEMENTS = 1 << 22
_COPIED_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken", ".py")
_COPIED_NAMES = ("LICENSE", "NOTICE", "USE_POLICY")
_COPIED_FOLDERS = ("additional_chat_templates",)
_WORDS = {dtype: word for word, dtype in FLOATS.items()}


class Merge:
    """One adapter (in float32, on the CPU), to be baked into the model of `skeleton`.

    `dtype` None keeps each tensor's. Nothing is written before `write`.

    Raises:
        ConfigurationError: the adapter touches one of two tied tensors, or the model's files have no such tensor.
    """

    def __init__(self, skeleton: ModelSkeleton, adapter: AdapterWeights, dtype: torch.dtype | None) -> None:
        self._checkpoint = skeleton.checkpoint
        self._dtype = dtype
        self._changes = _changes(skeleton, adapter)

    @property
    def num_changed(self) -> int:
        """Tensors that the adapter changes."""
        return len(self._changes)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors of the copy."""
        return sum(self._size(tensor) for shard in self._checkpoint.shards for tensor in shard.tensors)

    def write(self, folder: Path, on_bytes: Callable[[int], None] = lambda count: None) -> None:
        """Write the whole model into an empty folder and have the disk keep it; `on_bytes` is told of the progress.

        Raises:
            ConfigurationError: a value does not fit the dtype, or the model cannot be read.
            OSError: the folder cannot be written.
        """
        for shard in self._checkpoint.shards:
            with (folder / shard.name).open("wb") as sink:
                self._write_shard(shard, sink, on_bytes)
                sink.flush()
                os.fsync(sink.fileno())
        if self._checkpoint.index is not None:
            index = dict(self._checkpoint.index)
            index["metadata"] = {**index.get("metadata", {}), "total_size": self.num_bytes}
            (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
        _copy_other_files(self._checkpoint.folder, folder)
        if self._dtype is not None:
            _declare_dtype(folder / "config.json", str(self._dtype).removeprefix("torch."))

    def _write_shard(self, shard: Shard, sink: BinaryIO, on_bytes: Callable[[int], None]) -> None:
        """The file format is described in `adapters/safetensors_file.py`."""
        # widest elements first, as the safetensors package orders them: each tensor is aligned to its elements
        tensors = sorted(shard.tensors, key=lambda tensor: (-self._alignment(tensor), tensor.offset))
        header: dict[str, Any] = {"__metadata__": shard.metadata} if shard.metadata else {}
        end = 0
        for tensor in tensors:
            begin, end = end, end + self._size(tensor)
            header[tensor.name] = {"dtype": self._word(tensor), "shape": tensor.shape, "data_offsets": [begin, end]}
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        sink.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors:
            for data in self._data(tensor):
                sink.write(data)
                on_bytes(len(data))

    def _word(self, tensor: StoredTensor) -> str:
        return tensor.dtype if self._dtype is None or tensor.dtype not in FLOATS else _WORDS[self._dtype]

    def _size(self, tensor: StoredTensor) -> int:
        word = self._word(tensor)
        return tensor.num_bytes if word == tensor.dtype else math.prod(tensor.shape) * FLOATS[word].itemsize

    def _alignment(self, tensor: StoredTensor) -> int:
        elements = math.prod(tensor.shape)
        return self._size(tensor) // elements if elements else 8

    def _data(self, tensor: StoredTensor) -> Iterator[bytes | bytearray | memoryview]:
        """The tensor's bytes in the copy."""
        word, change = self._word(tensor), self._changes.get(tensor.name)
        if change is None and word == tensor.dtype:
            yield from tensor.chunks(PIECE_ELEMENTS * 4)
            return
        for piece in _sums(tensor, change):
            cast = piece.to(FLOATS[word])
            lowest, highest = torch.aminmax(cast)
            if not bool(torch.isfinite(lowest) & torch.isfinite(highest)):
                raise ConfigurationError(
                    f"{tensor.name} gets values that are too large for {word}: say --dtype bfloat16"
                )
            yield cast.view(torch.uint8).numpy().data


Change = Callable[[Tensor, int], Tensor]
"""From rows of a weight, float32 [n, columns], and the number of the first to what they become."""


def _changes(skeleton: ModelSkeleton, adapter: AdapterWeights) -> Mapping[str, Change]:
    """By the tensor's name in the files."""
    changes: dict[str, Change] = {}
    magnitudes = {tensor.module: values for tensor, values in adapter.own if tensor.parameter == MAGNITUDE}
    edges = {skeleton.targets[index].name for index in skeleton.edge_targets}
    for module in adapter.modules:
        target = skeleton.targets[module.target]
        if skeleton.is_tied and target.name in edges:
            raise _ties(target.name)
        weight = skeleton.weight_of(target)
        changes[weight.name] = _sum(weight, module, target, magnitudes.get(target.name))
    for tensor, values in adapter.own:
        if tensor.parameter == MAGNITUDE:
            continue
        if tensor.parameter == TRAINED_TOKENS:  # a tied head has them too, for PEFT as well
            changes[skeleton.tensor_of(f"{tensor.module}.weight").name] = _tokens(tensor.token_ids, values)
            continue
        if skeleton.is_tied and tensor.module in edges:
            raise _ties(tensor.module)
        changes[skeleton.tensor_of(f"{tensor.module}.{tensor.parameter}").name] = _own(values)
    return changes


def _ties(name: str) -> ConfigurationError:
    return ConfigurationError(
        f"the adapter touches {name}, whose weights this model shares between embedding and output head: merged, it "
        "would change both"
    )


def add_product(target: TargetModule, a: Tensor, b: Tensor) -> Change:
    """W + Bᵀ·A of a plain LoRA; float32 `a` [rank, in] and `b` [rank, out] with the scaling in it."""
    left, right = (a, b) if _has_rows_of_inputs(target) else (b, a)
    return lambda rows, first: rows + left[:, first : first + rows.shape[0]].t() @ right


def _has_rows_of_inputs(target: TargetModule) -> bool:
    """Whether the rows of the weight, as it is stored, are inputs; else they are outputs."""
    return target.fan_in_fan_out or target.kind is TargetKind.EMBEDDING


def _sum(weight: StoredTensor, module: ModuleWeights, target: TargetModule, magnitude: Tensor | None) -> Change:
    add = add_product(target, module.a, module.b)
    if magnitude is None:
        return add
    return _scaled_columns(weight, add, magnitude) if _has_rows_of_inputs(target) else _scaled_rows(add, magnitude)


def _scaled_rows(add: Change, magnitude: Tensor) -> Change:
    def change(rows: Tensor, first: int) -> Tensor:
        rows = add(rows, first)
        norms: Tensor = torch.linalg.norm(rows, dim=1)
        return rows * (magnitude[first : first + rows.shape[0]] / norms)[:, None]

    return change


def _scaled_columns(weight: StoredTensor, add: Change, magnitude: Tensor) -> Change:
    @cache
    def scale() -> Tensor:
        squares = torch.zeros_like(magnitude)
        for rows, first in _rows(weight):
            squares += add(rows, first).square().sum(dim=0)
        return magnitude / squares.sqrt()

    return lambda rows, first: add(rows, first) * scale()


def _tokens(token_ids: tuple[int, ...], vectors: Tensor) -> Change:
    def change(rows: Tensor, first: int) -> Tensor:
        changed = rows.clone()
        for token_id, vector in zip(token_ids, vectors, strict=True):
            if first <= token_id < first + rows.shape[0]:
                changed[token_id - first] = vector
        return changed

    return change


def _own(values: Tensor) -> Change:
    flat = values.reshape(values.shape[0], -1)
    return lambda rows, first: flat[first : first + rows.shape[0]]


def _sums(tensor: StoredTensor, change: Change | None) -> Iterator[Tensor]:
    """The elements of what W becomes in order, float32 where it changes."""
    if change is None:
        yield from tensor.floats(PIECE_ELEMENTS)
    else:
        yield from (change(rows, first).reshape(-1) for rows, first in _rows(tensor))


def _rows(tensor: StoredTensor) -> Iterator[tuple[Tensor, int]]:
    """Rows in float32, some at a time, each with the number of the first."""
    first = 0
    for piece in tensor.floats(PIECE_ELEMENTS):
        rows = piece.float().view(-1, math.prod(tensor.shape[1:]))
        yield rows, first
        first += rows.shape[0]


def _copy_other_files(source: Path, destination: Path) -> None:
    """Config, tokenizer, chat templates, code and licence; the model card speaks of another model."""
    for path in source.iterdir():
        if path.is_dir():
            if path.name in _COPIED_FOLDERS:
                shutil.copytree(path, destination / path.name)
        elif path.name.endswith(".index.json"):
            continue
        elif path.suffix in _COPIED_SUFFIXES or path.name.startswith(_COPIED_NAMES):
            shutil.copyfile(path, destination / path.name)


def _declare_dtype(path: Path, dtype: str) -> None:
    """Say in config.json what the weights are in, under the names that it uses."""
    config = json.loads(path.read_bytes())
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name in ("dtype", "torch_dtype"):
            if name in part:
                part[name] = dtype
    if "torch_dtype" not in config:
        config["dtype"] = dtype
    path.write_text(json.dumps(config, indent=2) + "\n")
