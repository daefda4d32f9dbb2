"""A server process of a test: its log in a file, ended by pid, gone when the test run itself is killed."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

# Below the range that systems hand out to outgoing connections: a port from here stays free while its server
# is down and clients keep knocking.
PORTS = range(15_000, 32_000)

# Waits on a pipe that only we hold: a word on it means that the server was ended by us; end of file means
# that we are gone, in whatever way, and the server must go too.
GUARD = 'read -r word || kill -9 "$0"'


class ServerFailed(Exception):
    """A server did not start or died; the message ends with the last lines of its log."""


def free_port() -> int:
    """A loopback TCP port that nobody listens on."""
    candidates = random.SystemRandom()
    for _ in range(200):
        port = candidates.choice(PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
    raise ServerFailed("no free loopback port between 15000 and 32000")


class ServerProcess:
    """Runs `command` with stdout and stderr appended to `log_path`.

        with ServerProcess([...], log_path=folder / "worker.log") as server:
            server.wait_until(lambda: is_up(), seconds=30)

    Leaving the block kills what still runs. The process has its own session: Ctrl-C in the terminal does not
    reach it.
    """

    def __init__(
        self, command: Sequence[str | Path], *, log_path: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.log_path = log_path
        self._name = Path(command[0]).name
        with log_path.open("ab") as log:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(environment or {})},
                start_new_session=True,
            )
        self._guard = subprocess.Popen(
            ["/bin/sh", "-c", GUARD, str(self.pid)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @property
    def pid(self) -> int:
        """The process id."""
        return self.process.pid

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        if self.process.poll() is None:
            return True
        self._dismiss_guard()  # its pid may soon be somebody else's
        return False

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal; nothing happens when the process has ended."""
        self.process.send_signal(number)

    def wait(self, seconds: float) -> int:
        """Waits for the process to end by itself; its exit code. Raises ServerFailed when it does not."""
        try:
            code = self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise ServerFailed(self.explain(f"did not end within {seconds} s")) from None
        self._dismiss_guard()
        return code

    def stop(self, seconds: float = 30.0) -> int:
        """SIGTERM, then SIGKILL after `seconds`; the exit code."""
        self.process.terminate()
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
        code = self.process.wait()
        self._dismiss_guard()
        return code

    def kill(self) -> None:
        """SIGKILL, and waits until the process is gone."""
        self.process.kill()
        self.process.wait()
        self._dismiss_guard()

    def wait_until(self, ready: Callable[[], bool], *, seconds: float) -> None:
        """Asks `ready` until it says yes. Raises ServerFailed when the process dies or the time is over."""
        limit = time.monotonic() + seconds
        while not ready():
            if not self.alive:
                raise ServerFailed(self.explain(f"ended with exit code {self.process.returncode}"))
            if time.monotonic() > limit:
                raise ServerFailed(self.explain(f"was not ready within {seconds} s"))
            time.sleep(0.05)

    def explain(self, what: str) -> str:
        """One line about the process and the end of its log."""
        return f"{self._name} (pid {self.pid}) {what}; its log ends with:\n{tail(self.log_path)}"

    def _dismiss_guard(self) -> None:
        if self._guard.stdin is not None and not self._guard.stdin.closed:
            with contextlib.suppress(BrokenPipeError):
                self._guard.stdin.write(b"ended\n")
                self._guard.stdin.flush()
            with contextlib.suppress(BrokenPipeError):
                self._guard.stdin.close()
        self._guard.wait()

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def answers(port: int) -> bool:
    """Whether something accepts TCP connections on a loopback port."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex(("127.0.0.1", port)) == 0


def tail(path: Path, lines: int = 40) -> str:
    """The last lines of a log file; empty when there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as log:
        log.seek(max(0, path.stat().st_size - 200 * lines))
        return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])
