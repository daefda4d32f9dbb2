"""A reader of safetensors files that trusts nothing in them.

Format (https://github.com/huggingface/safetensors#format): eight bytes little-endian, the header's length N; N bytes
of JSON, name → {dtype, shape, data_offsets}; the tensors' bytes, one after another without holes. Read here and not
with the safetensors package, because that keeps the last of two entries with one name, maps the file (a failing disk
would then be a SIGBUS instead of an error), and because a tensor is to be read straight before it is packed.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from loramux_worker.adapters.host_memory import allocate
from loramux_worker.adapters.invalid import AdapterInvalid, parse_object, quoted
from loramux_worker.adapters.regular_file import open_regular, read_up_to, unreadable

_MAX_HEADER_BYTES = 16 << 20
_LENGTH_BYTES = 8
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PICKLES = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")  # torch.save: a zip; older: a pickle


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies in the file: `offset` from the file's start, in bytes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_elements(self) -> int:
        """Product of the shape."""
        return math.prod(self.shape)

    @property
    def end(self) -> int:
        """Where it ends in the file, exclusive."""
        return self.offset + self.num_bytes

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor."""
        return self.num_elements * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """The header of a file named `name`: its JSON, unread, and how many bytes of tensors follow it."""

    name: str
    text: bytes
    num_data_bytes: int

    def entries(self) -> dict[str, TensorEntry]:
        """The tensors by name, in the file's order. Raises AdapterInvalid when it is not true of the file."""
        header = parse_object(self.text, f"{self.name}: header")
        _check_metadata(header.pop("__metadata__", {}), self.name)
        return _entries(header, self.name, _LENGTH_BYTES + len(self.text), self.num_data_bytes)


class TensorFile:
    """An open safetensors file; `header` has not been checked beyond its length.

    Raises:
        AdapterInvalid: on construction, when the file is missing or no safetensors file.
        RequestFailed: `adapter_unavailable`, any time, when the disk fails.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._name = name
        self._file = open_regular(folder, name)
        try:
            self.header = self._read_header()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; nothing can be read afterwards."""
        self._file.close()

    def read_pieces(self, entry: TensorEntry, max_elements: int) -> Iterator[Tensor]:
        """The tensor's elements in order, at most `max_elements` at a time."""
        for first in range(0, entry.num_elements, max_elements):
            count = min(max_elements, entry.num_elements - first)
            values = allocate(count, entry.dtype, pin=False)  # malloc would keep some of it for ever
            yield self.read_into(values, entry, first)

    def read_into(self, values: Tensor, entry: TensorEntry, first: int = 0) -> Tensor:
        """Fill `values`, contiguous and of the file's dtype, with the tensor's elements from `first` on."""
        self.read_bytes(values.view(-1).view(torch.uint8), entry.offset + first * entry.dtype.itemsize)
        return values

    def read_bytes(self, memory: Tensor, start: int) -> None:
        """Fill `memory`, uint8 and contiguous, from `start` of the file on."""
        self.read_spans([memory.numpy().data], start)

    def read_spans(self, spans: Sequence[memoryview], start: int) -> None:
        """Fill one after the other from `start` of the file on; 1,024 of them at most."""
        left = deque(span for span in spans if span)
        try:
            while left:
                count = os.preadv(self._file.fileno(), left, start)  # two gigabytes at most
                if not count:
                    raise AdapterInvalid(f"{self._name} became shorter while it was read")
                start += count
                while left and count >= len(left[0]):
                    count -= len(left.popleft())
                if count:
                    left[0] = left[0][count:]
        except OSError as error:
            raise unreadable(self._name, error) from None

    def _read_header(self) -> TensorHeader:
        name, size = self._name, os.fstat(self._file.fileno()).st_size
        start = read_up_to(self._file, _LENGTH_BYTES, name)
        length = int.from_bytes(start, "little")
        if len(start) < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
            if start.startswith(_PICKLES):
                raise AdapterInvalid(f"{name} is a pickle: only safetensors are read")
            raise AdapterInvalid(f"{name} is truncated or not a safetensors file: its header does not fit in it")
        if length > _MAX_HEADER_BYTES:
            raise AdapterInvalid(f"{name}: a header of {length} bytes is larger than {_MAX_HEADER_BYTES}")
        return TensorHeader(name, read_up_to(self._file, length, name), size - _LENGTH_BYTES - length)


def _check_metadata(metadata: object, name: str) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterInvalid(f"{name}: __metadata__ is not an object of strings")


def _entries(header: dict[str, Any], name: str, first_byte: int, data_bytes: int) -> dict[str, TensorEntry]:
    """Check that the tensors fill the data from its first byte to its last, each as its shape says."""
    fields = {tensor: _fields(value, f"{name}: {quoted(tensor)}") for tensor, value in header.items()}
    at = 0
    entries = {}
    for tensor, (dtype, shape, begin, end) in sorted(fields.items(), key=lambda item: item[1][2:]):
        num_bytes = math.prod(shape) * dtype.itemsize
        if begin != at or end - begin != num_bytes:
            raise AdapterInvalid(
                f"{name}: {quoted(tensor)} lies at bytes {quoted(begin)} to {quoted(end)}, "
                f"its shape and place say {at} to {quoted(at + num_bytes)}"
            )
        entries[tensor] = TensorEntry(tensor, dtype, shape, first_byte + begin)
        at = end
    if at != data_bytes:
        raise AdapterInvalid(
            f"{name} is truncated or too long: {data_bytes} bytes of data, its header says {quoted(at)}"
        )
    return entries


def _fields(value: object, where: str) -> tuple[torch.dtype, tuple[int, ...], int, int]:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise AdapterInvalid(f"{where} has no dtype, shape and data_offsets, or has more than those")
    dtype = _DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise AdapterInvalid(f"{where} has dtype {quoted(value['dtype'])}: float32, float16 and bfloat16 are read")
    shape, offsets = value["shape"], value["data_offsets"]
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise AdapterInvalid(f"{where} has a shape or offsets that are no sizes")
    if 0 in shape or len(shape) > 8:
        raise AdapterInvalid(f"{where} has the shape {quoted(shape)}")
    return dtype, tuple(shape), offsets[0], offsets[1]


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)
