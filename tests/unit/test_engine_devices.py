"""Which device each engine gets; torch, which takes seconds to come, is asked only where there may be a GPU."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch

from loramux_worker import assembly
from loramux_worker.assembly import engine_configs
from loramux_worker.settings import WorkerSettings


def devices(**settings: object) -> list[str]:
    return [config.device for config in engine_configs(WorkerSettings(model="m", **settings), None)]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch is asked")
def test_without_a_driver_torch_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_such_library(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", no_such_library)
    monkeypatch.setattr(assembly.os.path, "exists", lambda path: False)
    monkeypatch.setitem(sys.modules, "torch", None)  # to import it is an error
    assert devices() == ["auto"]
    assert devices(device="cuda", engines=2) == ["cuda", "cuda"]
    monkeypatch.setattr(ctypes, "CDLL", lambda name: name)
    with pytest.raises(ImportError):
        devices()


@pytest.mark.parametrize(
    ("gpus", "settings", "expected"),
    [
        (0, {"engines": 3}, ["auto"] * 3),
        (2, {}, ["cuda:0", "cuda:1"]),
        (2, {"engines": 3, "device": "cuda"}, ["cuda:0", "cuda:1", "cuda:0"]),
        (2, {"device": "cpu"}, ["cpu"]),
    ],
)
def test_engines_go_round_the_gpus(
    monkeypatch: pytest.MonkeyPatch, gpus: int, settings: dict[str, object], expected: list[str]
) -> None:
    monkeypatch.setattr(assembly, "_has_driver", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    assert devices(**settings) == expected
