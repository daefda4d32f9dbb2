"""Which GPU an engine process sees."""

from __future__ import annotations

import pytest

from loramux_worker.engine.config import EngineConfig, confine, step_threads


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


@pytest.mark.parametrize(
    ("devices", "cores", "expected"),
    [(["cpu"], 2, 1), (["cpu"], 1, 1), (["auto"], 8, 7), (["cpu"] * 3, 8, 2), (["cuda:0", "cuda:1"], 8, None)],
)
def test_engines_on_a_cpu_leave_a_core_to_the_front(devices: list[str], cores: int, expected: int | None) -> None:
    assert step_threads(devices, cores, {}) == expected
    assert step_threads(devices, cores, {"OMP_NUM_THREADS": "4"}) is None, "somebody has said how many"
