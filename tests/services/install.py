"""Fetches the servers that the tests run against into a cache folder.

    python tests/services/install.py [--only kafka|s3|kustomize]

    .services/kafka/libs/*.jar   Apache Kafka, through Maven (Java 17 or newer runs it); kafka_classes.py adds to it
    .services/bin/versitygw      an S3 server, built by Go
    .services/bin/kustomize      no server: it renders deploy/kubernetes; built by Go

The folder is `.services` in the project root, or what LORAMUX_SERVICES names. What is there already, in the
version pinned here, is left alone. Each service stands for itself: without Go there is still Kafka. When one
could not be had, one line says why and the exit code is 1. Standard library only, so that it runs anywhere.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
POM = Path(__file__).resolve().with_name("pom.xml")
# Go programs: the name of the binary → (package, version).
GO_PROGRAMS = {
    "versitygw": ("github.com/versity/versitygw/cmd/versitygw", "v1.8.0"),
    "kustomize": ("sigs.k8s.io/kustomize/kustomize/v5", "v5.7.1"),
}
OLDEST_JAVA = 17

HOW_TO_INSTALL = "run `make services` (Kafka needs Java 17+ and Maven, the S3 server and kustomize need Go)"


class ServiceMissing(Exception):
    """A service is not in the cache folder or cannot be brought there; the message is one line."""


def services_folder() -> Path:
    """The cache folder: LORAMUX_SERVICES, or `.services` in the project root."""
    return Path(os.environ.get("LORAMUX_SERVICES") or PROJECT / ".services").resolve()


def kafka_libs() -> Path:
    """The folder with Kafka's jars. Raises ServiceMissing."""
    folder = services_folder() / "kafka"
    stamp = folder / "pom.xml"
    if not stamp.is_file() or stamp.read_bytes() != POM.read_bytes():
        raise ServiceMissing(f"Apache Kafka is not in {folder}: {HOW_TO_INSTALL}")
    check_java()
    return folder / "libs"


def kafka_classes() -> Path:
    """Where the archive of Kafka's classes lies, if it was made."""
    return services_folder() / "kafka" / "classes.jsa"


def versitygw() -> Path:
    """The S3 server's executable. Raises ServiceMissing."""
    return go_program("versitygw")


def kustomize() -> Path:
    """The executable that renders Kubernetes manifests. Raises ServiceMissing."""
    return go_program("kustomize")


def go_program(name: str) -> Path:
    """The executable of one of GO_PROGRAMS, in its pinned version. Raises ServiceMissing."""
    _, version = GO_PROGRAMS[name]
    binary = services_folder() / "bin" / name
    stamp = binary.with_name(f"{name}.version")
    if not binary.is_file() or not stamp.is_file() or stamp.read_text().strip() != version:
        raise ServiceMissing(f"{name} {version} is not in {binary.parent}: {HOW_TO_INSTALL}")
    return binary


def check_java() -> None:
    """Raises ServiceMissing unless a Java that can run Kafka is on PATH."""
    advice = f"install a JDK, {OLDEST_JAVA} or newer (Debian: apt-get install openjdk-17-jdk-headless)"
    if shutil.which("java") is None:
        raise ServiceMissing(f"no `java` on PATH: {advice}")
    # Prints `openjdk version "17.0.15" …` to stderr; macOS has a stub that only says there is none.
    said = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False).stderr
    found = re.search(r'version "(\d+)', said)
    if found is None or int(found.group(1)) < OLDEST_JAVA:
        raise ServiceMissing(f"`java` is {found.group(1) if found else 'not usable'}: {advice}")


def install_kafka() -> None:
    """Brings Kafka's jars into the cache folder. Raises ServiceMissing."""
    if shutil.which("mvn") is None:
        raise ServiceMissing("no `mvn` on PATH: install Maven (Debian: apt-get install maven)")
    check_java()
    folder = services_folder() / "kafka"
    libs, stamp = folder / "libs", folder / "pom.xml"
    stamp.unlink(missing_ok=True)
    kafka_classes().unlink(missing_ok=True)
    shutil.rmtree(libs, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    run(
        ["mvn", "-q", "-B", "-f", str(POM), "dependency:copy-dependencies", "-DincludeScope=runtime",
         f"-DoutputDirectory={libs}"],
    )  # fmt: skip
    shutil.copyfile(POM, stamp)  # last: the stamp says that the jars are complete


def build_go_program(name: str) -> None:
    """Builds one of GO_PROGRAMS into the cache folder. Raises ServiceMissing."""
    if shutil.which("go") is None:
        raise ServiceMissing("no `go` on PATH: install Go 1.25 or newer (1.21 to 1.24 fetch it themselves)")
    package, version = GO_PROGRAMS[name]
    folder = services_folder() / "bin"
    stamp = folder / f"{name}.version"
    stamp.unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    run(["go", "install", f"{package}@{version}"], environment={"GOBIN": str(folder)})
    stamp.write_text(f"{version}\n")


def run(command: list[str], environment: dict[str, str] | None = None) -> None:
    """Runs an installer, its output straight to the terminal. Raises ServiceMissing when it fails."""
    finished = subprocess.run(command, env={**os.environ, **(environment or {})}, stdin=subprocess.DEVNULL, check=False)
    if finished.returncode != 0:
        raise ServiceMissing(f"`{' '.join(command)}` failed with exit code {finished.returncode} (see above)")


def ensure(name: str, hint: str, locate: Callable[[], Path], install: Callable[[], None]) -> bool:
    """Installs one service unless it is there; says what it does. Returns whether the service can be used."""
    try:
        place = locate()
    except ServiceMissing:
        print(f"services: getting {name} ({hint}) …", flush=True)
        started = time.monotonic()
        try:
            install()
            place = locate()
        except ServiceMissing as missing:
            print(f"services: {name} is missing: {missing}", file=sys.stderr, flush=True)
            return False
        print(f"services: {name} is in {place} ({time.monotonic() - started:.0f} s)", flush=True)
    else:
        print(f"services: {name} is there", flush=True)
    return True


def main() -> int:
    """Brings the services that the command line asks for; the exit code."""
    parser = argparse.ArgumentParser(description="fetch the servers that the tests run against")
    parser.add_argument("--only", choices=["kafka", "s3", "kustomize"], help="this one instead of all")
    only = parser.parse_args().only
    usable = []
    if only in (None, "kafka"):
        usable.append(ensure("Apache Kafka", "43 MB of jars, some seconds", kafka_libs, install_kafka))
    for name, locate, what in (("versitygw", versitygw, "s3"), ("kustomize", kustomize, "kustomize")):
        if only in (None, what):
            build = partial(build_go_program, name)
            usable.append(ensure(f"{name} {GO_PROGRAMS[name][1]}", "built once, some minutes", locate, build))
    if only is None and shutil.which("kcat") is None:
        print("services: no `kcat` on PATH, its tests need it (Debian: apt-get install kcat)", file=sys.stderr)
    return 0 if all(usable) else 1


if __name__ == "__main__":
    sys.exit(main())
