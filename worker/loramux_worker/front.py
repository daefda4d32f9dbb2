"""The front: one asyncio process that wires intake → text → engines → publisher.

intake ─► Answerer (one task a request) ─► delivery
             │ catalog   tokenizers   pool
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

import structlog
import uvloop

from loramux_worker.adapters.catalog import AdapterCatalog
from loramux_worker.adapters.disk import DiskTier
from loramux_worker.adapters.store import AdapterStore
from loramux_worker.answer import Answerer
from loramux_worker.authorization import Authorization
from loramux_worker.cancellations import Cancellations
from loramux_worker.dedupe import Duplicates
from loramux_worker.engine.config import EngineConfig
from loramux_worker.engine.protocol import AdapterMoved
from loramux_worker.front_state import FrontCollector
from loramux_worker.health import HealthServer
from loramux_worker.kafka.commits import PlainCommits
from loramux_worker.kafka.control import ControlReader
from loramux_worker.kafka.delivery import AtLeastOnce, Delivery
from loramux_worker.kafka.exactly_once import ExactlyOnce
from loramux_worker.kafka.intake import Intake
from loramux_worker.kafka.publisher import Publisher
from loramux_worker.kafka.records import OutgoingRecord, Record
from loramux_worker.kafka.sending import RecordRefused
from loramux_worker.kafka.topics import ensure_topics
from loramux_worker.kafka.transactions import require_transactions
from loramux_worker.logs import configure_logs
from loramux_worker.metrics import Metrics, TransactionCollector, WorkerCollector
from loramux_worker.pool import EnginePool
from loramux_worker.replies import ReplyWriter, Topics
from loramux_worker.settings import WorkerSettings
from loramux_worker.stopwatch import Stopwatch
from loramux_worker.text.tokenizer import Tokenizer
from loramux_worker.text.tokenizers import Tokenizers

if TYPE_CHECKING:
    from loramux_worker.tracing import Tracing

log = structlog.get_logger(__name__)

_TAKE_TIMEOUT = 0.2  # seconds that one look into Kafka waits


def serve(settings: WorkerSettings) -> None:
    """Run a worker until SIGTERM or SIGINT.

    Raises:
        ConfigurationError: something a person must change before the worker can start.
    """
    configure_logs(settings.log_format, settings.log_level, settings.secrets)
    uvloop.run(_serve(settings))


class Front:
    """Takes records as far as the look-ahead allows and has each answered by a task of its own."""

    def __init__(
        self,
        intake: Intake,
        answerer: Answerer,
        replies: ReplyWriter,
        publisher: Publisher,
        delivery: Delivery,
        look_ahead: int,
        tracing: Tracing | None = None,
    ) -> None:
        self._intake = intake
        self._answerer = answerer
        self._replies = replies
        self._publisher = publisher
        self._delivery = delivery
        self._look_ahead = look_ahead
        self._tracing = tracing
        self._tasks: dict[asyncio.Task[None], tuple[int, int]] = {}
        self._freed = asyncio.Event()
        self._drain_began: float | None = None

    @property
    def in_flight(self) -> int:
        """Requests that were taken and not answered yet."""
        return len(self._tasks)

    @property
    def draining_seconds(self) -> float:
        """Seconds since the drain began, 0 before it."""
        return 0.0 if self._drain_began is None else time.monotonic() - self._drain_began

    async def take_requests(self) -> None:
        """Take records and start answering them until `drain`."""
        while self._drain_began is None:
            room = self._look_ahead - self.in_flight
            if room <= 0:
                self._freed.clear()
                await self._freed.wait()
                continue
            for record in await self._intake.take(room, _TAKE_TIMEOUT):
                task = asyncio.create_task(self._answer(record), name=f"{record.partition}/{record.offset}")
                self._tasks[task] = (record.partition, record.epoch)
                task.add_done_callback(self._finished)

    async def drain(self, timeout: float) -> None:
        """Take nothing more; let what runs finish for `timeout` seconds, then give it up (it stays in Kafka)."""
        self._drain_began = time.monotonic()
        self._freed.set()
        if self._tasks:
            log.info("draining", in_flight=self.in_flight, timeout=timeout)
            await asyncio.wait(self._tasks, timeout=timeout)
        await self._cancel(list(self._tasks))

    def lose(self, lost: Collection[tuple[int, int]]) -> None:
        """These (partition, epoch) belong to another worker now: stop working on their requests."""
        for task, owner in self._tasks.items():
            if owner in lost:
                task.cancel()

    async def _answer(self, record: Record) -> None:
        structlog.contextvars.bind_contextvars(partition=record.partition, offset=record.offset)
        watch = Stopwatch(record.timestamp_ms)
        answers = await self._answerer(record, watch)
        try:
            await self._delivery.complete(record, tuple(self._fitting(record, answer) for answer in answers))
        except RecordRefused as refused:
            log.warning("answer_refused", topic=refused.record.topic, reason=refused.reason)
            answers = (self._replies.instead(record, refused.record, str(refused)),)
            await self._delivery.complete(record, answers)
        if self._tracing is not None:
            self._tracing.answered(record, answers, watch)

    def _fitting(self, record: Record, answer: OutgoingRecord) -> OutgoingRecord:
        if self._publisher.fits(answer):
            return answer
        size = len(answer.value or b"")
        reason = f"the reply has {size} bytes, more than topic {answer.topic} takes"
        return self._replies.instead(record, answer, reason)

    def _finished(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        self._freed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            # the record stays undone: it is read again by whoever owns the partition next
            log.error("answer_lost", record=task.get_name(), exc_info=error)

    async def _cancel(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _raise_file_limit() -> None:
    """As many open files as the system allows: each adapter in use holds one, and shells give 1024 by default."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # some systems say "unlimited" and do not mean it
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def _serve(settings: WorkerSettings) -> None:
    _raise_file_limit()
    stopping, stopping_now = (asyncio.create_task(event.wait()) for event in _on_signals())
    async with contextlib.AsyncExitStack() as stack:
        building = asyncio.create_task(_build(settings, stack))
        await asyncio.wait([building, stopping], return_when=asyncio.FIRST_COMPLETED)
        if not building.done():
            building.cancel()
            await asyncio.wait([building])
            log.info("worker_stopped", reason="a signal came before it was ready")
            return
        front, health = building.result()
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


async def _build(settings: WorkerSettings, stack: contextlib.AsyncExitStack) -> tuple[Front, HealthServer]:
    """Start every part, the slow ones side by side; `stack` ends them in the opposite order."""
    connection = settings.connection
    authorization = Authorization(settings.authorization_file, settings.tenant_header)
    following = asyncio.create_task(authorization.follow())
    stack.callback(following.cancel)
    name = f"{socket.gethostname()}-{os.getpid()}"
    metrics = Metrics()
    tracing = _tracing(settings, name)
    if tracing is not None:
        stack.push_async_callback(tracing.close)

    def on_move(moved: AdapterMoved) -> None:
        metrics.moved(moved)
        if tracing is not None:
            tracing.moved(moved)

    catalog = _catalog(settings, on_move)
    stack.push_async_callback(catalog.close)
    await ensure_topics(
        connection, _topics_by_flag(settings), create=settings.create_topics, startup_timeout=settings.startup_timeout
    )
    topic, group_id = settings.requests_topic, settings.group_id
    if settings.delivery == "exactly_once":
        await require_transactions(connection, topic=topic, group_id=group_id, timeout=settings.startup_timeout)
    pool = EnginePool(_engine_configs(settings), on_move)
    stack.push_async_callback(pool.close)
    engines = asyncio.create_task(pool.start())
    stack.callback(engines.cancel)
    tokenizers = Tokenizers(await asyncio.to_thread(Tokenizer.load, settings.model), settings.model)
    stack.callback(tokenizers.close)
    preloaded = await catalog.preload(settings.adapters)
    await engines
    for adapter in preloaded:
        pool.prefetch(adapter)
    publisher = Publisher(
        connection,
        topics=_topics_by_flag(settings).values(),
        startup_timeout=settings.startup_timeout,
    )
    await publisher.start()
    stack.push_async_callback(publisher.close)
    topics = Topics(settings.replies_topic, settings.stream_topic, settings.dead_letter_topic, settings.reply_topics)
    replies = ReplyWriter(name, topics, metrics, log_text=settings.log_text)
    cancellations = Cancellations(settings.cancel_memory)
    control = ControlReader(
        connection,
        settings.control_topic,
        memory=settings.cancel_memory,
        on_cancel=cancellations.cancel,
        startup_timeout=settings.startup_timeout,
    )
    await control.start()
    stack.push_async_callback(control.close)
    answerer = Answerer(
        topics=topics,
        authorization=authorization,
        tokenizers=tokenizers,
        catalog=catalog,
        pool=pool,
        replies=replies,
        post=publisher.send_soon,
        cancellations=cancellations,
        duplicates=Duplicates(settings.dedupe_window, on_copy=metrics.duplicates.inc),
    )
    exactly_once = None
    if settings.delivery == "exactly_once":
        exactly_once = ExactlyOnce(connection, topic=topic, group_id=group_id, publisher=publisher)
    intake = Intake(
        connection,
        topic=topic,
        group_id=group_id,
        commits=exactly_once or PlainCommits(connection, topic=topic, group_id=group_id),
        on_lost=lambda lost: front.lose(lost),
        startup_timeout=settings.startup_timeout,
        session_timeout=settings.session_timeout,
    )
    delivery = exactly_once or AtLeastOnce(publisher, intake)
    front = Front(intake, answerer, replies, publisher, delivery, settings.look_ahead, tracing)
    await intake.start()
    stack.push_async_callback(intake.close)
    metrics.registry.register(WorkerCollector(pool, intake, catalog, publisher))
    if exactly_once is not None:
        metrics.registry.register(TransactionCollector(exactly_once))

    def is_ready() -> bool:
        return pool.is_ready and bool(intake.assigned) and intake.trouble is None and publisher.trouble is None

    metrics.registry.register(
        FrontCollector(name, settings.model, pool, front, is_ready=is_ready, drain_timeout=settings.drain_timeout)
    )
    health = HealthServer(settings.http_host, settings.http_port, metrics.registry, is_ready)
    health.start()
    stack.callback(health.close)
    return front, health


def _engine_configs(settings: WorkerSettings) -> list[EngineConfig]:
    """One config an engine; on a machine with several GPUs each has its own."""
    shared = {
        name: getattr(settings, name) for name in EngineConfig.__struct_fields__ if name in WorkerSettings.model_fields
    }
    for name in ("kv_cache_memory", "adapter_memory", "host_memory"):
        shared[name] = None if shared[name] is None else int(shared[name])  # the wire knows no ByteSize
    shared["policies"] = settings.policies
    return [EngineConfig(**{**shared, "device": device}) for device in _devices(settings)]


def _devices(settings: WorkerSettings) -> list[str]:
    if settings.device not in ("auto", "cuda"):
        return [settings.device] * (settings.engines or 1)
    import torch  # takes seconds: not before what can be told at once

    if not torch.cuda.is_available():
        return [settings.device] * (settings.engines or 1)
    gpus = torch.cuda.device_count()
    return [f"cuda:{i % gpus}" for i in range(settings.engines or gpus)]


def _tracing(settings: WorkerSettings, name: str) -> Tracing | None:
    if settings.otlp_endpoint is None:
        return None
    from loramux_worker.tracing import Tracing  # an extra, and nothing to load where nobody looks

    return Tracing(settings.otlp_endpoint, name, settings.group_id)


def _catalog(settings: WorkerSettings, on_load: Callable[[AdapterMoved], None]) -> AdapterCatalog:
    store = None
    if settings.adapter_uri is not None:
        store = AdapterStore(settings.adapter_uri, timeout=settings.adapter_timeout)
    return AdapterCatalog(
        store,
        DiskTier(settings.disk_cache, settings.disk_quota),
        revision_ttl=settings.revision_ttl,
        adapter_timeout=settings.adapter_timeout,
        on_load=on_load,
    )


def _topics_by_flag(settings: WorkerSettings) -> dict[str, str]:
    return {
        "--requests-topic": settings.requests_topic,
        "--replies-topic": settings.replies_topic,
        "--stream-topic": settings.stream_topic,
        "--dead-letter-topic": settings.dead_letter_topic,
        "--control-topic": settings.control_topic,
    }


def _on_signals() -> tuple[asyncio.Event, asyncio.Event]:
    """Events that the first and the second SIGTERM or SIGINT set."""
    first, second = asyncio.Event(), asyncio.Event()

    def on_signal(name: str) -> None:
        log.info("signal", name=name)
        (second if first.is_set() else first).set()

    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, on_signal, number.name)
    return first, second
