"""What the consumer group has committed, and who may commit.

aiokafka's `consumer.committed()` cannot be trusted with this: a coordinator that is still loading the group
answers with an error for the whole group, which it overlooks, so that it says "nothing committed" and
everything would be read again. And it does not ask whether a transaction has yet to end.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Collection
from typing import Final, NamedTuple

from aiokafka import AIOKafkaConsumer
from aiokafka.client import AIOKafkaClient, ConnectionGroup, CoordinationType
from aiokafka.errors import KafkaError, for_code

from loramux_schemas import KafkaConnection
from loramux_worker.kafka.connecting import client_options
from loramux_worker.kafka.offsets_protocol import OffsetFetchRequest

SECONDS: Final = 10.0
UNSTABLE_OFFSET_COMMIT: Final = 88  # aiokafka has no name for this code


class Commit(NamedTuple):
    """A committed position and the metadata string beside it."""

    position: int
    metadata: str


class Membership(NamedTuple):
    """A consumer in one generation of its group. The coordinator refuses commits of a former one."""

    generation: int
    member_id: str

    @classmethod
    def of(cls, consumer: AIOKafkaConsumer) -> Membership:
        """The consumer's at this moment."""
        coordinator = consumer._coordinator
        return cls(coordinator.generation, coordinator.member_id)


class OffsetsUnstable(KafkaError):  # type: ignore[misc]
    """A transaction with offsets of these partitions has yet to end."""

    retriable = True


async def committed(
    connection: KafkaConnection, group_id: str, topic: str, partitions: Collection[int]
) -> dict[int, Commit | None]:
    """The group's commit for each of `partitions`, None where there is none.

    A partition is left out while a transaction that commits it has yet to end. Raises KafkaError, OSError or
    TimeoutError when the coordinator cannot say, and OffsetsUnstable when all are left out.
    """
    client = AIOKafkaClient(**client_options(connection))
    try:
        async with asyncio.timeout(SECONDS):
            await client.bootstrap()
            node = await client.coordinator_lookup(CoordinationType.GROUP, group_id)
            request = OffsetFetchRequest(group_id, topic, partitions)
            answer = await client.send(node, request, group=ConnectionGroup.COORDINATION)
    finally:
        await client.close()
    if answer.error_code:
        raise for_code(answer.error_code)()
    commits: dict[int, Commit | None] = {}
    for each in itertools.chain.from_iterable(of_topic["partitions"] for of_topic in answer.to_object()["topics"]):
        if each["error_code"] == UNSTABLE_OFFSET_COMMIT:
            continue
        if each["error_code"]:
            raise for_code(each["error_code"])()
        position, metadata = each["offset"], each["metadata"] or ""
        commits[each["partition"]] = Commit(position, metadata) if position >= 0 else None
    if partitions and not commits:
        raise OffsetsUnstable(f"partitions {sorted(partitions)} of {topic}")
    return commits
