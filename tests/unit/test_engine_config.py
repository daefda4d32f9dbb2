"""Which GPU an engine process sees."""

from __future__ import annotations

import pytest

from loramux_worker.engine.config import EngineConfig, confine


@pytest.mark.parametrize(
    ("device", "visible", "expected_device", "expected_visible"),
    [
        ("cuda:1", None, "cuda", "1"),
        ("cuda:0", None, "cuda", "0"),
        ("cuda:1", "3, 5", "cuda", "5"),
        ("cuda:1", "GPU-a,GPU-b", "cuda", "GPU-b"),
        ("cuda:2", "3,5", "cuda", ""),  # there is no such GPU: the engine says so
        ("cuda", "3,5", "cuda", "3,5"),
        ("cpu", None, "cpu", None),
        ("auto", None, "auto", None),
    ],
)
def test_a_process_sees_its_own_gpu_alone(
    device: str, visible: str | None, expected_device: str, expected_visible: str | None
) -> None:
    environment = {"PATH": "/bin"} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    config, environment = confine(EngineConfig(model="m", device=device), environment)
    assert config == EngineConfig(model="m", device=expected_device)
    assert environment["PATH"] == "/bin"
    assert environment.get("CUDA_VISIBLE_DEVICES") == expected_visible
