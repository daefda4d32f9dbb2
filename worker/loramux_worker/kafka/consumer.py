"""How aiokafka's consumer is set up for a worker, and how it is stopped within bounds."""

from __future__ import annotations

import asyncio
from typing import Any, Final

import structlog
from aiokafka import AIOKafkaConsumer
from aiokafka.coordinator.assignors.sticky.sticky_assignor import StickyPartitionAssignor

from loramux_schemas import KafkaConnection
from loramux_worker.kafka.connecting import client_options
from loramux_worker.kafka.unpacking import bound_unpacking

STOP_SECONDS: Final = 10.0

log = structlog.get_logger(__name__)


def consumer_options(connection: KafkaConnection, group_id: str, session_timeout: float) -> dict[str, Any]:
    """Keyword arguments for an AIOKafkaConsumer, one member of the group; `session_timeout` is in seconds."""
    bound_unpacking()
    # The assignor keeps its memory in class attributes: two consumers of one process must not share the
    # class.
    assignor = type("WorkerAssignor", (StickyPartitionAssignor,), {})
    return {
        **client_options(connection),
        "group_id": group_id,
        "partition_assignment_strategy": (assignor,),
        "enable_auto_commit": False,
        # Positions come from commits that we write ourselves; a silent reset would lose or repeat requests.
        "auto_offset_reset": "none",
        "isolation_level": "read_committed",
        # aiokafka fetches nothing more from a broker before what it fetched is taken: so much of one partition's
        # backlog the others may have to wait for. A larger message comes all the same, alone.
        "max_partition_fetch_bytes": 64 << 10,
        "session_timeout_ms": int(session_timeout * 1000),
        "heartbeat_interval_ms": int(min(1.0, session_timeout / 3) * 1000),
        # Below the request timeout: a JoinGroup waits this long for its answer.
        "rebalance_timeout_ms": 30_000,
        "request_timeout_ms": 40_000,
        # With full queues nothing is polled for as long as the engine needs: that is no reason to leave the
        # group.
        "max_poll_interval_ms": 2**31 - 1,
        "metadata_max_age_ms": 60_000,
        "retry_backoff_ms": 250,
    }


async def stop(consumer: AIOKafkaConsumer) -> None:
    """Leaves the group and closes; gives up after STOP_SECONDS, as a broker that is away answers nothing."""
    # In a task of its own: while a broker is away, aiokafka's stop() cancels a task of its own, waits for it, and
    # so ends with a CancelledError that nobody meant for us, its connections still open.
    stopping = asyncio.ensure_future(consumer.stop())
    try:
        await asyncio.wait([stopping], timeout=STOP_SECONDS)
    finally:
        stopping.cancel()
    if not stopping.done() or stopping.cancelled() or stopping.exception() is not None:
        log.warning("consumer_stop_failed", hint="the group notices after the session timeout")
        await consumer._client.close()
