"""The front's side of one engine: its process, its socket and the generations it works on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog
import zmq
import zmq.asyncio

from loramux_schemas import ErrorCode
from loramux_worker.engine.config import EngineConfig, confine
from loramux_worker.engine.protocol import (
    PROTOCOL_VERSION,
    AdapterMoved,
    AdapterReference,
    Cancel,
    EngineMessage,
    Failed,
    FrontMessage,
    Outputs,
    Prefetch,
    Ready,
    Refused,
    Stats,
    Stop,
    decode_engine_message,
    encode,
)
from loramux_worker.errors import ConfigurationError, Poisonous, RequestFailed
from loramux_worker.generation import Generation
from loramux_worker.suspects import MAX_DEATHS, Suspects

log = structlog.get_logger(__name__)

_STOP_TIMEOUT = 5.0  # seconds from Stop to kill
_MAX_BACKOFF = 30.0  # seconds between restarts


class EngineClient:
    """Starts an engine process, speaks with it, and starts another when it dies.

    A generation outlives its engine: the next one gets the request with the tokens that came so far. `on_move` is told
    of each adapter that has come into one of its tiers.
    """

    def __init__(self, index: int, config: EngineConfig, folder: Path, on_move: Callable[[AdapterMoved], None]) -> None:
        self.index = index
        self.ready: Ready | None = None
        self.stats: Stats | None = None
        self.restarts = 0
        self._config = config
        self._folder = folder
        self._on_move = on_move
        self._generations: dict[int, Generation] = {}
        self._suspects = Suspects()
        self._context = zmq.asyncio.Context()
        self._socket: zmq.asyncio.Socket | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._started: asyncio.Future[None] | None = None
        self._closing = asyncio.Event()

    async def start(self) -> None:
        """Start the process and wait until it takes requests.

        Raises:
            ConfigurationError: it refused its settings, or ended before it was ready.
        """
        self._started = asyncio.get_running_loop().create_future()
        self._keeper = asyncio.create_task(self._keep_running(), name=f"engine-{self.index}")
        self._keeper.add_done_callback(self._keeper_ended)
        await self._started

    @property
    def is_ready(self) -> bool:
        """Whether the process is there and its model loaded."""
        return self._socket is not None

    @property
    def in_flight(self) -> int:
        """Generations that it has been given and that are not done."""
        return len(self._generations)

    def submit(self, generation: Generation) -> None:
        """Hand over a generation now, or as soon as the engine is ready."""
        self._generations[generation.sequence_id] = generation
        self._send(generation.submission())

    def cancel(self, generation: Generation) -> None:
        """Forget a generation if it is here."""
        if self._generations.pop(generation.sequence_id, None) is not None:
            self._send(Cancel(generation.sequence_id))
            self._suspects.forget(generation)
            self._let_in()

    def prefetch(self, adapter: AdapterReference) -> None:
        """Tell the engine that requests for this adapter are coming."""
        self._send(Prefetch(adapter))

    async def close(self) -> None:
        """Stop the process, by force if it does not listen; generations that are not done fail."""
        self._closing.set()
        if self._process is not None and self._process.returncode is None:
            if self._socket is None:
                self._process.terminate()
            self._send(Stop())
            try:
                await asyncio.wait_for(self._process.wait(), _STOP_TIMEOUT)
            except TimeoutError:
                self._process.kill()
        if self._keeper is not None:
            await self._keeper
        for generation in self._generations.values():
            generation.fail(RequestFailed(ErrorCode.CANCELLED, "the worker is going down"))
        self._generations.clear()
        self._context.destroy(linger=0)

    def _let_in(self) -> None:
        """Submit the next suspect, if it is time."""
        if self._socket is not None and (suspect := self._suspects.let_in()) is not None:
            self._send(suspect.submission())

    def _send(self, message: FrontMessage) -> None:
        if self._socket is not None:  # what is said before Ready is repeated then
            self._socket.send(encode(message))

    async def _keep_running(self) -> None:
        """Run one process after the other while the worker lives."""
        backoff = 1.0
        while not self._closing.is_set():
            was_ready = await self._run_once()
            if self._closing.is_set():
                return
            code = None if self._process is None else self._process.returncode
            if self.ready is None:
                self._refuse_start(f"engine {self.index} ended with code {code} while starting; see its log above")
                return
            self.restarts += 1
            log.error("engine_died", engine=self.index, exit_code=code, in_flight=self.in_flight)
            if was_ready:
                self._accuse()
                backoff = 1.0
            else:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._closing.wait(), backoff)
                backoff = min(2 * backoff, _MAX_BACKOFF)

    def _keeper_ended(self, keeper: asyncio.Task[None]) -> None:
        """Nobody waits for the keeper: what it dies of must not go unheard."""
        if keeper.cancelled() or (error := keeper.exception()) is None:
            return
        self._socket = None
        log.critical("engine_unkept", engine=self.index, exc_info=error)
        if self._started is not None and not self._started.done():
            self._started.set_exception(error)

    def _refuse_start(self, reason: str) -> None:
        if self._started is not None and not self._started.done():
            self._started.set_exception(ConfigurationError(reason))

    async def _run_once(self) -> bool:
        """Start a process and listen to it until it ends; returns whether it ever was ready."""
        address = f"ipc://{self._folder}/engine-{self.index}-{self.restarts}.sock"
        socket = self._context.socket(zmq.PAIR)
        socket.set_hwm(0)
        socket.bind(address)
        try:
            self._process = process = await self._launch(address)
        except OSError as error:  # no memory, no more processes: another time
            log.error("engine_not_launched", engine=self.index, reason=str(error))
            socket.close(linger=0)
            return False
        if self._closing.is_set():
            process.kill()  # `close` came while it was launched, and knew only its predecessor
        listener = asyncio.create_task(self._listen(socket))
        ended = asyncio.create_task(process.wait())
        await asyncio.wait([listener, ended], return_when=asyncio.FIRST_COMPLETED)
        if listener.done():  # an engine that nobody hears is of no use
            log.error("engine_unheard", engine=self.index, exc_info=listener.exception())
            process.kill()
        await ended
        await asyncio.wait([listener], timeout=0.2)  # what it said last is still in the socket
        listener.cancel()
        await asyncio.wait([listener])
        was_ready, self._socket = self._socket is not None, None
        socket.close(linger=0)
        return was_ready

    async def _launch(self, address: str) -> asyncio.subprocess.Process:
        config, environment = confine(self._config, os.environ)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "loramux_worker.engine.process",
            address,
            stdin=asyncio.subprocess.PIPE,
            env=environment,
            start_new_session=True,  # a Ctrl-C in the terminal is for the front alone
        )
        assert process.stdin is not None
        process.stdin.write(msgspec.json.encode(config) + b"\n")
        return process

    async def _listen(self, socket: zmq.asyncio.Socket) -> None:
        while True:
            self._hear(decode_engine_message(await socket.recv()), socket)

    def _hear(self, message: EngineMessage, socket: zmq.asyncio.Socket) -> None:
        match message:
            case Outputs():
                self._take(message)
            case Stats():
                self.stats = message
            case AdapterMoved():
                self._on_move(message)
            case Failed():
                generation = self._generations.pop(message.sequence_id, None)
                if generation is not None:
                    generation.fail(RequestFailed(ErrorCode(message.code), message.message))
                    self._suspects.heard_of(generation)
                    self._let_in()
            case Ready():
                self._become_ready(message, socket)
            case Refused():
                self._refuse_start(message.message)
                log.error("engine_refused", engine=self.index, reason=message.message)

    def _become_ready(self, message: Ready, socket: zmq.asyncio.Socket) -> None:
        if message.protocol_version != PROTOCOL_VERSION:
            reason = (
                f"engine {self.index} speaks protocol {message.protocol_version}, the front {PROTOCOL_VERSION}: "
                "install one version of loramux"
            )
            self._refuse_start(reason)
            raise ConfigurationError(reason)
        self.ready = message
        self._socket = socket
        for generation in self._generations.values():
            if generation not in self._suspects:
                self._send(generation.submission())
        self._let_in()
        if self._started is not None and not self._started.done():
            self._started.set_result(None)

    def _take(self, message: Outputs) -> None:
        timings = {t.sequence_id: t for t in message.timings}
        for output in message.outputs:
            generation = self._generations.get(output.sequence_id)
            if generation is None:  # cancelled while this was on its way
                continue
            if output.finish_reason is not None:
                generation.timing = timings.get(output.sequence_id)
                del self._generations[output.sequence_id]
            generation.add(output)
            self._suspects.heard_of(generation)
        self._let_in()

    def _accuse(self) -> None:
        """Give up the sequence that the engine has died of, if it is known."""
        culprit = self._suspects.engine_died(self._generations.values())
        if culprit is not None:
            del self._generations[culprit.sequence_id]
            culprit.fail(Poisonous(f"{MAX_DEATHS} engines died while working on this request"))
