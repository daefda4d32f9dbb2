"""The image: its lock agrees with pyproject.toml and with what the tests ran with; its licences are looked at."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import missing
from deploy.manifests import DEPLOY
from loramux_worker.settings import WorkerSettings

ROOT = DEPLOY.parent
LICENCES = re.compile(
    r"(MIT|0BSD|BSD|Apache|ISC|MPL|PSF|CNRI-Python|Zlib|CC0|BSL|LicenseRef-NVIDIA-Proprietary|NVIDIA Proprietary)"
)


def locked(name: str = "requirements.txt") -> dict[Requirement, int]:
    """Each requirement of a lock, and how many hashes it has."""
    text = (DEPLOY / "image" / name).read_text()
    blocks = [block for block in re.split(r"\n(?=[a-z])", text) if re.match(r"[a-z]", block)]
    return {Requirement(block.partition("\\")[0].strip()): block.count("--hash=sha256:") for block in blocks}


@pytest.mark.parametrize("name", ["requirements.txt", "tools.txt"])
def test_everything_is_pinned_by_hash_and_names_no_index(name: str) -> None:
    assert "://" not in (DEPLOY / "image" / name).read_text()
    requirements = locked(name)
    assert len(requirements) > 3
    for requirement, hashes in requirements.items():
        assert hashes > 0, requirement
        assert [specifier.operator for specifier in requirement.specifier] == ["=="], requirement


def test_the_lock_is_in_step_with_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    versions: dict[str, set[str]] = {}
    for requirement in locked():
        pinned = next(iter(requirement.specifier)).version
        versions.setdefault(canonicalize_name(requirement.name), set()).add(pinned)
    for text in [*project["dependencies"], *project["optional-dependencies"]["worker"]]:
        wanted = Requirement(text)
        pinned_to = versions.get(canonicalize_name(wanted.name), set())
        assert pinned_to, f"{text} is not in the lock: run `make lock`"
        assert all(wanted.specifier.contains(each) for each in pinned_to), (
            f"{text} is locked to {pinned_to}: `make lock`"
        )


def test_what_the_tests_run_with_is_what_the_image_has() -> None:
    differing = {
        requirement.name: (version(requirement.name), str(requirement.specifier))
        for requirement in locked()
        if requirement.marker is None or requirement.marker.evaluate()
        if not requirement.specifier.contains(version(requirement.name))
    }
    if differing and os.environ.get("CI") != "true":
        missing(f"this environment was not made from the lock: {differing}")
    assert not differing


@pytest.mark.skipif(sys.platform != "linux", reason="the image is Linux")
def test_licences_are_listed_and_known() -> None:
    path = DEPLOY / "image" / "licences.py"
    spec = spec_from_file_location("licences", path)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    written = dict(line.split(": ", 1) for line in path.with_suffix(".txt").read_text().splitlines())
    assert module.listed() == written, "run `make lock`"
    # cuda-toolkit has no files of its own: it only names NVIDIA's packages
    unknown = {name: each for name, each in written.items() if not LICENCES.search(each) and name != "cuda-toolkit"}
    assert not unknown
    assert not {name for name, each in written.items() if re.search(r"(^|[^L])GPL|SSPL|BUSL", each)}


def test_the_image_is_set_up_as_the_worker_expects() -> None:
    text = (DEPLOY / "Dockerfile").read_text()
    assert re.findall(r"^FROM .* AS (\w+)$", text, re.MULTILINE)[-3:] == ["cpu", "demo", "cuda"]
    for name in set(re.findall(r"\bLORAMUX_([A-Z_]+)=", text)):
        assert name.lower() in WorkerSettings.model_fields, name
    assert f"EXPOSE {WorkerSettings.model_fields['http_port'].default}\n" in text
    # every stage that ends in an image runs as nobody in particular
    last_user = {}
    for stage in re.split(r"^FROM ", text, flags=re.MULTILINE)[1:]:
        base, _, name = stage.partition("\n")[0].partition(" AS ")
        users = re.findall(r"^USER (\S+)$", stage, re.MULTILINE)
        last_user[name] = users[-1] if users else last_user.get(base, "root")
    assert {last_user[name] for name in ("cpu", "demo", "cuda")} == {"10001:10001"}
    copied = {path for line in re.findall(r"^COPY (?!--)(.+) /\S+$", text, re.MULTILINE) for path in line.split()}
    assert copied
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    for path in copied:
        assert (ROOT / path).exists(), path
        assert f"!{path}" in ignored, f"{path} is not in the build's context"
