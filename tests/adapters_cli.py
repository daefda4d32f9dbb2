"""Running `loramux adapters …` in the test's own process, and interrupting it."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import structlog

from loramux_worker import cli

SECONDS = 30.0


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it printed."""

    code: int
    out: str
    err: str

    def assert_refused(self, *words: str) -> None:
        """Exit code 2 and one line that names all of these."""
        assert (self.code, self.out) == (2, ""), self
        assert self.err.startswith("loramux: ")
        assert self.err.count("\n") == 1
        for word in words:
            assert word in self.err


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> Outcome:
    """`loramux adapters` with these arguments."""
    code = 0
    capsys.readouterr()  # what the test itself has printed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["loramux", "adapters", *map(str, arguments)])
        patch.setenv("COLUMNS", "120")
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
        finally:
            structlog.reset_defaults()  # the commands silence it
    return Outcome(code, *capsys.readouterr())


@contextmanager
def interrupted_when(condition: Callable[[], bool]) -> Iterator[None]:
    """Ctrl-C as soon as the condition holds, once."""

    def wait() -> None:
        until = time.monotonic() + SECONDS
        while not condition():
            if time.monotonic() > until:
                return
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        yield
    finally:
        thread.join()


class SilentServer:
    """A server that takes connections and never answers; `reached` once one has come."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.settimeout(SECONDS)
        self._connections: list[socket.socket] = []
        self._thread = threading.Thread(target=self._accept)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._socket.getsockname()[1]}"

    def __enter__(self) -> SilentServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        for connection in (*self._connections, self._socket):
            connection.close()

    def _accept(self) -> None:
        while True:
            try:
                self._connections.append(self._socket.accept()[0])
            except OSError:
                return
            self.reached.set()
