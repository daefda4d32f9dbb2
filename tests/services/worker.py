"""A `loramux worker` as a process, for tests and benchmarks."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from services.process import ServerProcess, free_port, tail


def worker_topics(create: Callable[[str, int], str], partitions: int = 4) -> dict[str, str]:
    """New topics for one worker, by flag; `create` is the fixture `kafka_topics`."""
    return {
        "requests_topic": create("requests", partitions),
        "replies_topic": create("replies", partitions),
        "stream_topic": create("stream", partitions),
        "dead_letter_topic": create("dead-letters", 1),
        "control_topic": create("control", 2),
    }


class WorkerProcess:
    """A worker from `with` to the end of its block; flags as keywords (`max_batched_tokens=64`).

    `environment` is added to the test's own. `launcher` are words before the command: a program that ends by
    executing what follows it.

    `server` is its front process: `server.stop()` drains it, `server.kill()` does not ask (the engine notices that
    the front is gone and ends too).
    """

    def __init__(
        self,
        bootstrap_servers: str,
        model: Path,
        *,
        wait: bool = True,
        environment: Mapping[str, str] | None = None,
        launcher: Sequence[str] = (),
        **flags: object,
    ) -> None:
        self.port = free_port()
        self._folder = tempfile.TemporaryDirectory(prefix="loramux-worker-")
        self.log_path = Path(self._folder.name) / "worker.log"
        self._wait = wait
        self._environment = environment
        flags = {"disk_cache": Path(self._folder.name) / "adapters", "log_format": "json", **flags}
        self.command = [*launcher, sys.executable, "-m", "loramux_worker", "worker"]
        self.command += ["--bootstrap-servers", bootstrap_servers, "--model", str(model)]
        self.command += ["--http-port", str(self.port)]
        for name, value in flags.items():
            flag = f"--{name.replace('_', '-')}"
            self.command += [flag] if value is True else [flag, str(value)]

    def __enter__(self) -> WorkerProcess:
        self.server = ServerProcess(self.command, log_path=self.log_path, environment=self._environment)
        try:
            if self._wait:
                self.wait_ready()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            error.add_note(tail(self.log_path))
        if self.server.alive:
            self.server.stop()
        self._folder.cleanup()

    def wait_ready(self, seconds: float = 180.0) -> None:
        """Wait until `/readyz` says 200."""
        self.server.wait_until(self.is_ready, seconds=seconds)

    def engine_pids(self) -> list[int]:
        """Its engine processes that run now."""
        with contextlib.suppress(FileNotFoundError):  # the worker, or one of them, has just ended
            children = Path(f"/proc/{self.server.pid}/task/{self.server.pid}/children").read_text().split()
            return [int(c) for c in children if b"engine.process" in Path(f"/proc/{c}/cmdline").read_bytes()]
        return []

    def is_ready(self) -> bool:
        """Whether `/readyz` says 200."""
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            self.get("/readyz")
            return True
        return False

    def get(self, path: str) -> str:
        """A page of its HTTP server."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as response:
            return response.read().decode()

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels."""
        lines = [line for line in self.get("/metrics").splitlines() if line.startswith((f"{name} ", f"{name}{{"))]
        return sum(float(line.rpartition(" ")[2]) for line in lines)
