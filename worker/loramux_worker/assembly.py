"""The parts of a worker, made from its settings and put together."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import socket
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from loramux_schemas import AdapterName
from loramux_worker.adapters.catalog import AdapterCatalog
from loramux_worker.adapters.disk import DiskTier
from loramux_worker.adapters.store import AdapterStore
from loramux_worker.answer import Answerer
from loramux_worker.authorization import Authorization
from loramux_worker.cancellations import Cancellations
from loramux_worker.dedupe import Duplicates
from loramux_worker.engine.config import EngineConfig, num_cores, step_threads
from loramux_worker.engine.protocol import AdapterMoved, AdapterReference
from loramux_worker.errors import ConfigurationError, RequestFailed
from loramux_worker.front import Front
from loramux_worker.front_state import FrontCollector
from loramux_worker.health import HealthServer
from loramux_worker.kafka.commits import PlainCommits
from loramux_worker.kafka.control import ControlReader
from loramux_worker.kafka.delivery import AtLeastOnce
from loramux_worker.kafka.exactly_once import ExactlyOnce
from loramux_worker.kafka.intake import Intake
from loramux_worker.kafka.publisher import Publisher
from loramux_worker.kafka.topics import ensure_topics
from loramux_worker.kafka.transactions import require_transactions
from loramux_worker.look_ahead import Window
from loramux_worker.metrics import Metrics, TransactionCollector, WorkerCollector
from loramux_worker.pool import EnginePool
from loramux_worker.replies import ReplyWriter, Topics
from loramux_worker.settings import WorkerSettings
from loramux_worker.text.tokenizer import Tokenizer
from loramux_worker.text.tokenizers import Tokenizers

if TYPE_CHECKING:
    from loramux_worker.tracing import Tracing


async def assemble(settings: WorkerSettings, stack: contextlib.AsyncExitStack) -> tuple[Front, HealthServer]:
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
    merged = await lease_merged(settings, catalog, stack)
    pool = EnginePool(engine_configs(settings, merged), on_move)
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
    window = Window(settings.look_ahead, settings.adapter_look_ahead, settings.max_parked, int(settings.parked_memory))
    front = Front(intake, answerer, replies, publisher, delivery, window, cancellations, tracing)
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


async def lease_merged(
    settings: WorkerSettings, catalog: AdapterCatalog, stack: contextlib.AsyncExitStack
) -> AdapterReference | None:
    """The adapter of `--merge-adapter`. Engines may start anew at any time: its folder stays until the worker ends."""
    if settings.merge_adapter is None:
        return None
    try:
        reference = await catalog.acquire(AdapterName.parse(settings.merge_adapter))
    except RequestFailed as error:
        raise ConfigurationError(f"--merge-adapter {settings.merge_adapter}: {error}") from error
    stack.callback(catalog.release, reference)
    return reference


def engine_configs(settings: WorkerSettings, merged: AdapterReference | None) -> list[EngineConfig]:
    """One config an engine; on a machine with several GPUs each has its own."""
    shared = {
        name: getattr(settings, name) for name in EngineConfig.__struct_fields__ if name in WorkerSettings.model_fields
    }
    shared["merge_adapter"] = merged
    for name in ("kv_cache_memory", "adapter_memory", "host_memory"):
        shared[name] = None if shared[name] is None else int(shared[name])  # the wire knows no ByteSize
    shared["policies"] = settings.policies
    devices = _devices(settings)
    shared["threads"] = step_threads(devices, num_cores(), os.environ)
    return [EngineConfig(**{**shared, "device": device}) for device in devices]


def _devices(settings: WorkerSettings) -> list[str]:
    if settings.device not in ("auto", "cuda") or not _has_driver():
        return [settings.device] * (settings.engines or 1)
    import torch  # takes seconds, in which no engine has begun to start: not where the answer is known

    if not torch.cuda.is_available():
        return [settings.device] * (settings.engines or 1)
    gpus = torch.cuda.device_count()
    return [f"cuda:{i % gpus}" for i in range(settings.engines or gpus)]


def _has_driver() -> bool:
    """Whether a GPU's driver is there, without which torch finds no GPU."""
    if sys.platform != "linux" or os.path.exists("/dev/kfd"):  # torch knows; AMD's
        return True
    with contextlib.suppress(OSError):
        ctypes.CDLL("libcuda.so.1")
        return True
    return False


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
