"""The safetensors files of a base model, read a piece at a time: no file is mapped and no tensor is read whole."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loramux_worker.errors import ConfigurationError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 256 << 20


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a shard: `offset` from the file's start and `num_bytes`; `dtype` in the words of safetensors."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    def floats(self, max_elements: int) -> Iterator[Tensor]:
        """The elements in order, whole rows (along the first axis) at a time: at least one, at most `max_elements`.

        Raises ConfigurationError when they are no floats, or when the disk fails.
        """
        if self.dtype not in FLOATS:
            raise ConfigurationError(f"--model: {self.name} in {self.file} holds {self.dtype}, no plain floats")
        dtype = FLOATS[self.dtype]
        row = max(1, math.prod(self.shape[1:]))
        for data in self.chunks(max(1, max_elements // row) * row * dtype.itemsize):
            yield torch.frombuffer(data, dtype=dtype)

    def chunks(self, max_bytes: int) -> Iterator[bytearray]:
        """The bytes in order. Raises ConfigurationError when the disk fails."""
        try:
            with self.file.open("rb") as source:
                source.seek(self.offset)
                for first in range(0, self.num_bytes, max_bytes):
                    data = bytearray(min(max_bytes, self.num_bytes - first))
                    if source.readinto(data) != len(data):
                        raise ConfigurationError(f"--model: {self.file} is truncated")
                    yield data
        except OSError as error:
            raise ConfigurationError(f"--model: {self.file}: {error.strerror or error}") from error


@dataclass(frozen=True, slots=True)
class Shard:
    """One file: its `__metadata__` and its tensors in their order."""

    name: str
    metadata: dict[str, str]
    tensors: tuple[StoredTensor, ...]


class Checkpoint:
    """A model folder's weights. `index` is the parsed index file, None where one file holds all.

    Raises ConfigurationError, naming the file, when something is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = None if (folder / SINGLE_FILE).is_file() else _read_index(folder)
        names = (SINGLE_FILE,) if self.index is None else tuple(sorted(set(self.index["weight_map"].values())))
        self.shards = tuple(_read_shard(folder / name) for name in names)
        self.tensors = {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}


def _read_index(folder: Path) -> dict[str, Any]:
    try:
        index = json.loads((folder / INDEX_FILE).read_bytes())
        files = set(index["weight_map"].values())
    except FileNotFoundError:
        raise ConfigurationError(
            f"--model {folder}: has neither {SINGLE_FILE} nor {INDEX_FILE}: only safetensors are read"
        ) from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigurationError(f"--model: {folder / INDEX_FILE} is not the index of a model's files") from None
    strange = next((file for file in files if not isinstance(file, str) or Path(file).name != file), None)
    if strange is not None or not files:
        raise ConfigurationError(f"--model: {folder / INDEX_FILE} names {strange!r}, which is no file beside it")
    return index  # type: ignore[no-any-return]


def _read_shard(path: Path) -> Shard:
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if length > _MAX_HEADER_BYTES:
                raise ValueError
            header = json.loads(file.read(length))
            size = file.seek(0, 2)
        metadata = header.pop("__metadata__", {})
        first = _LENGTH_BYTES + length
        tensors = [
            StoredTensor(name, path, entry["dtype"], tuple(entry["shape"]), first + begin, end - begin)
            for name, entry in header.items()
            for begin, end in (entry["data_offsets"],)
        ]
        if any(tensor.offset + tensor.num_bytes > size or tensor.num_bytes < 0 for tensor in tensors):
            raise ValueError
    except FileNotFoundError:
        raise ConfigurationError(f"--model: {path} is missing") from None
    except OSError as error:
        raise ConfigurationError(f"--model: {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ConfigurationError(f"--model: {path} is truncated or no safetensors file") from None
    return Shard(path.name, metadata, tuple(sorted(tensors, key=lambda tensor: tensor.offset)))
