"""An engine as a process of its own: `python -m loramux_worker.engine.process ADDRESS`.

The front writes one line, the `EngineConfig` as JSON, to standard input and leaves it open: when it closes, the front
is gone and so is the engine. Everything else goes over a ZeroMQ pair socket at ADDRESS.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import time
from typing import TYPE_CHECKING

import msgspec
import structlog
import zmq

from loramux_worker.engine.config import EngineConfig
from loramux_worker.engine.protocol import (
    EngineMessage,
    FrontMessage,
    Refused,
    Stop,
    decode_front_message,
    encode,
)
from loramux_worker.errors import ConfigurationError
from loramux_worker.logs import configure_logs

if TYPE_CHECKING:
    from loramux_worker.engine.build import EngineParts

log = structlog.get_logger(__name__)

_STATS_INTERVAL = 0.25  # seconds
_LOADING_POLL = 2  # milliseconds: nothing to run, an adapter on its way
_IDLE_POLL = 200  # milliseconds


class FrontConnection:
    """The engine's end of the pair socket."""

    def __init__(self, address: str) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.PAIR)
        self._socket.set_hwm(0)
        self._socket.connect(address)

    def send(self, message: EngineMessage) -> None:
        """Queue a message; never blocks."""
        self._socket.send(encode(message))

    def receive(self, timeout: int) -> list[FrontMessage]:
        """Every message that is there, after waiting up to `timeout` milliseconds for the first."""
        messages: list[FrontMessage] = []
        if self._socket.poll(timeout):
            try:
                while True:
                    messages.append(decode_front_message(self._socket.recv(zmq.NOBLOCK)))
            except zmq.Again:
                pass
        return messages

    def close(self) -> None:
        """Send what is queued and close."""
        self._socket.close(linger=1000)
        self._context.term()


def run(parts: EngineParts, front: FrontConnection) -> None:
    """Take messages and step until `Stop`."""
    engine = parts.engine
    front.send(parts.ready)
    next_stats = 0.0
    while True:
        ran = engine.step()
        waits_for_adapter = engine.has_work or parts.adapters.is_loading
        for message in front.receive(0 if ran else _LOADING_POLL if waits_for_adapter else _IDLE_POLL):
            if isinstance(message, Stop):
                return
            engine.handle(message)
        if (now := time.monotonic()) >= next_stats:
            front.send(parts.stats())
            next_stats = now + _STATS_INTERVAL


def main() -> None:
    """Run one engine; exits when told to, or when the front is gone."""
    config = msgspec.json.decode(sys.stdin.buffer.readline(), type=EngineConfig)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the front decides
    threading.Thread(target=_exit_with_front, daemon=True).start()
    configure_logs(config.log_format, config.log_level)
    log.info("engine_starting", device=config.device, pid=os.getpid())
    front = FrontConnection(sys.argv[1])
    try:
        parts = _build(config, front)
        gc.collect()
        gc.freeze()  # the model's objects stay: no later collection needs to look at them
        log.info("engine_ready", **msgspec.structs.asdict(parts.ready))
        run(parts, front)
    except ConfigurationError as error:
        front.send(Refused(str(error)))
    finally:
        front.close()


def _build(config: EngineConfig, front: FrontConnection) -> EngineParts:
    gc.disable()  # what is imported stays, and looking through it again and again takes a fifth of the seconds
    import torch
    from transformers.utils import logging as transformers_logging

    from loramux_worker.engine.build import build_engine

    gc.enable()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    if not sys.stderr.isatty():
        transformers_logging.disable_progress_bar()
    return build_engine(config, front.send)


def _exit_with_front() -> None:
    os.read(sys.stdin.fileno(), 1)  # nothing ever comes: it returns when the front is gone
    os._exit(1)


if __name__ == "__main__":
    main()
