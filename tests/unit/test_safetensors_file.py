"""The reader of safetensors files reads what the safetensors package writes, and refuses the rest."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from loramux_worker.adapters.invalid import AdapterInvalid
from loramux_worker.adapters.safetensors_file import TensorEntry, TensorFile

NAME = "adapter_model.safetensors"


def read(file: TensorFile, entry: TensorEntry) -> torch.Tensor:
    return file.read_into(torch.empty(entry.shape, dtype=entry.dtype), entry)


def entries(folder: Path) -> dict[str, TensorEntry]:
    with TensorFile(folder, NAME) as file:
        return file.header.entries()


def raw(header: object, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


ENTRY = {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}
DATA = b"\x00" * 8
BAD_FILES: list[tuple[bytes, str]] = [
    (b"", "truncated or not a safetensors"),
    (b"\x08\x00\x00", "truncated or not a safetensors"),
    (b"\xff" * 64, "truncated or not a safetensors"),
    (raw({"a": ENTRY}, DATA, length=1 << 62), "truncated or not a safetensors"),
    (raw({"a": ENTRY}, DATA, length=3), "not valid JSON"),
    (b"PK\x03\x04" + b"\x00\x00\x08\x08" * 20, "is a pickle"),
    (b"\x80\x02}q\x00(X\x01" + b"a" * 50, "is a pickle"),
    (raw(b"[]", b""), "not a JSON object"),
    (raw(b"[" * 10_000, b""), "not valid JSON"),
    (raw(b'{"a": %s, "a": %s}' % ((json.dumps(ENTRY).encode(),) * 2), DATA), "'a' stands there twice"),
    (raw({"a": ENTRY}, DATA[:-1]), "truncated or too long"),
    (raw({"a": ENTRY}, DATA + b"x"), "truncated or too long"),
    (raw({"a": {**ENTRY, "data_offsets": [8, 16]}}, DATA * 2), "lies at bytes 8 to 16"),
    (raw({"a": {**ENTRY, "data_offsets": [0, 4]}}, DATA), "lies at bytes 0 to 4"),
    (raw({"a": {**ENTRY, "data_offsets": [0, 16]}}, DATA * 2), "lies at bytes 0 to 16"),
    (raw({"a": {**ENTRY, "data_offsets": [8, 0]}}, DATA), "lies at bytes 8 to 0"),
    (raw({"a": {**ENTRY, "data_offsets": [-8, 0]}}, DATA), "no sizes"),
    (raw({"a": {**ENTRY, "data_offsets": [0, 8, 8]}}, DATA), "no sizes"),
    (raw({"a": {**ENTRY, "data_offsets": {}}}, DATA), "no sizes"),
    (raw({"a": {**ENTRY, "data_offsets": [0, 8.0]}}, DATA), "no sizes"),
    (raw({"a": ENTRY, "b": ENTRY}, DATA), "'b' lies at bytes 0 to 8"),
    (raw({"a": {**ENTRY, "shape": [2**40, 2**40, 2**40]}}, DATA), "lies at bytes"),
    (raw({"a": {**ENTRY, "shape": [10**400]}}, DATA), "lies at bytes"),
    (raw({"a": {**ENTRY, "shape": [True, 2]}}, DATA), "no sizes"),
    (raw({"a": {**ENTRY, "shape": "12"}}, DATA), "no sizes"),
    (raw({"a": {**ENTRY, "shape": [1] * 1000 + [2]}}, DATA), "has the shape"),
    (raw({"a": {**ENTRY, "dtype": "F4"}}, DATA), "dtype 'F4'"),
    (raw({"a": {**ENTRY, "dtype": ["F32"]}}, DATA), "has dtype"),
    (raw({"a": {"dtype": "F32", "shape": [2]}}, DATA), "has no dtype, shape and data_offsets"),
    (raw({"a": {**ENTRY, "more": 1}}, DATA), "or has more"),
    (raw({"a": 3}, DATA), "has no dtype"),
    (raw({"__metadata__": {"x": 1}, "a": ENTRY}, DATA), "__metadata__"),
    (raw({"__metadata__": [], "a": ENTRY}, DATA), "__metadata__"),
    (raw(b" " * (17 << 20), b""), "larger than"),
]


@pytest.mark.parametrize(("data", "reason"), BAD_FILES, ids=range(len(BAD_FILES)))
def test_file_that_is_no_safetensors(tmp_path: Path, data: bytes, reason: str) -> None:
    (tmp_path / NAME).write_bytes(data)
    with pytest.raises(AdapterInvalid, match=reason):
        entries(tmp_path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.randn(4, 5), "b": torch.randn(3)}, tmp_path / NAME)
    whole = (tmp_path / NAME).read_bytes()
    for length in range(len(whole)):
        (tmp_path / NAME).write_bytes(whole[:length])
        with pytest.raises(AdapterInvalid):
            entries(tmp_path)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    save_file({"a": torch.randn(400, 500)}, tmp_path / NAME)
    with TensorFile(tmp_path, NAME) as file:
        os.truncate(tmp_path / NAME, 100_000)
        with pytest.raises(AdapterInvalid, match="became shorter"):
            read(file, file.header.entries()["a"])


def test_our_reader_reads_what_safetensors_writes(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.randn(i + 1, 3).to(dtype) for i, dtype in enumerate([torch.float32, torch.bfloat16] * 3)}
    save_file(tensors, tmp_path / NAME, metadata={"format": "pt"})
    with TensorFile(tmp_path, NAME) as file:
        assert file.header.entries().keys() == tensors.keys()
        for name, entry in file.header.entries().items():
            assert torch.equal(read(file, entry), tensors[name])
            assert torch.equal(torch.cat(list(file.read_pieces(entry, 4))), tensors[name].flatten())
