"""What `kustomize build` makes of deploy/kubernetes, as Python sees it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from loramux_worker.settings import WorkerSettings
from services.install import kustomize

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"

Manifest = dict[str, Any]


@cache
def _render(folder: str) -> str:
    command = [kustomize(), "build", DEPLOY / "kubernetes" / folder]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def rendered(folder: str) -> list[Manifest]:
    """The resources of a folder of deploy/kubernetes. Raises ServiceMissing without kustomize."""
    return list(yaml.safe_load_all(_render(folder)))


def of_kind(manifests: list[Manifest], kind: str) -> list[Manifest]:
    """Those of one kind."""
    return [manifest for manifest in manifests if manifest["kind"] == kind]


def the(manifests: list[Manifest], kind: str, name: str | None = None) -> Manifest:
    """The only one of a kind, or of that name."""
    [found] = [each for each in of_kind(manifests, kind) if name in (None, each["metadata"]["name"])]
    return found


def worker(manifests: list[Manifest]) -> tuple[Manifest, Manifest]:
    """The worker's pod spec and its container."""
    pod = the(manifests, "Deployment")["spec"]["template"]["spec"]
    [container] = pod["containers"]
    return pod, container


def environment(manifests: list[Manifest]) -> dict[str, str]:
    """The worker's variables: its configuration, and what it has from secrets as a word in their place."""
    _, container = worker(manifests)
    variables: dict[str, str] = {}
    for source in container["envFrom"]:
        if "configMapRef" in source:
            variables |= the(manifests, "ConfigMap", source["configMapRef"]["name"])["data"]
    return variables | {each["name"]: each.get("value", "from-a-secret") for each in container.get("env", [])}


def settings(variables: dict[str, str], flags: list[str], tmp_path: Path) -> WorkerSettings:
    """The settings that a worker with these variables and flags has; a folder stands for the model's."""
    ours = {name.removeprefix("LORAMUX_").lower(): value for name, value in variables.items() if "LORAMUX_" in name}
    assert set(ours) <= set(WorkerSettings.model_fields), "a variable is no setting of the worker"
    for flag in flags:
        assert flag.startswith("--"), flag
        assert flag[2:].replace("-", "_") in WorkerSettings.model_fields, flag
    return WorkerSettings(**{**ours, "model": str(tmp_path)})


def quantity(text: str) -> int:
    """Bytes of a Kubernetes quantity or of a size of ours: 48Gi, 24GiB, 1536Mi, 4g."""
    units = {"k": 10, "m": 20, "g": 30, "t": 40}
    number = text.rstrip("iBKMGTkmgt")
    return int(float(number) * 2 ** units[text[len(number)].lower()])


def duration(text: str) -> float:
    """Seconds of 75s or 10m."""
    return float(text[:-1]) * {"s": 1, "m": 60, "h": 3600}[text[-1]]


def containers(pod: Manifest) -> Iterator[Manifest]:
    """All containers of a pod, those that come first too."""
    yield from pod.get("initContainers", ())
    yield from pod["containers"]
