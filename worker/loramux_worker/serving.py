"""The life of a worker: started, ready, drained on the first signal, gone on the second."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import resource
import signal

import structlog
import uvloop

from loramux_worker.assembly import assemble
from loramux_worker.health import HealthServer
from loramux_worker.logs import configure_logs
from loramux_worker.settings import WorkerSettings

log = structlog.get_logger(__name__)


def serve(settings: WorkerSettings) -> None:
    """Run a worker until SIGTERM or SIGINT.

    Raises:
        ConfigurationError: something a person must change before the worker can start.
    """
    configure_logs(settings.log_format, settings.log_level, settings.secrets)
    gc.disable()  # until it has started: what is imported stays, and looking through it takes a fifth of the time
    try:
        uvloop.run(_serve(settings))
    finally:
        gc.enable()


def _raise_file_limit() -> None:
    """As many open files as the system allows: each adapter in use holds one, and shells give 1024 by default."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems say "unlimited" and do not mean it
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _serve(settings: WorkerSettings) -> None:
    _raise_file_limit()
    stopping, stopping_now = (asyncio.create_task(event.wait()) for event in _on_signals())
    async with contextlib.AsyncExitStack() as stack:
        building = asyncio.create_task(assemble(settings, stack))
        await asyncio.wait([building, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not building.done():
            building.cancel()
            await asyncio.wait([building])
            log.info("worker_stopped", reason="a signal came before it was ready")
            return
        front, health = building.result()
        gc.enable()
        gc.collect()
        gc.freeze()  # libraries and vocabulary stay: a collection that looks at them takes a quarter of a second
        log.info("worker_started", http_port=health.port, group_id=settings.group_id, topic=settings.requests_topic)
        taking = asyncio.create_task(front.take_requests())
        announcing = asyncio.create_task(_announce_ready(health))
        await asyncio.wait([taking, stopping], return_when=asyncio.FIRST_COMPLETED)
        drain = asyncio.create_task(front.drain(settings.drain_timeout))
        await asyncio.wait([drain, stopping_now], return_when=asyncio.FIRST_COMPLETED)
        announcing.cancel()
        await taking
    log.info("worker_stopped")


async def _announce_ready(health: HealthServer) -> None:
    while not health.is_ready():  # noqa: ASYNC110 - brokers, engines and the group decide together
        await asyncio.sleep(0.05)
    log.info("worker_ready", http_port=health.port)


def _on_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Events that the first and the second SIGTERM or SIGINT set."""
    first, second = asyncio.Event(), asyncio.Event()

    def on_signal(name: str) -> None:
        log.info("signal", name=name)
        (second if first.is_set() else first).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number.name)
    return first, second
