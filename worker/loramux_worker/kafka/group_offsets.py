"""What the consumer group has committed: read through the administration client.

aiokafka's `consumer.committed()` cannot be trusted with this: a coordinator that is still loading the group
answers with an error for the whole group, which it overlooks, so that it says "nothing committed" and
everything would be read again. The administration client overlooks the error too, but tells a partition
without a commit (offset -1) from a partition without an answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Final, NamedTuple

from aiokafka import TopicPartition
from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import GroupLoadInProgressError

from loramux_schemas import KafkaConnection
from loramux_worker.kafka.connecting import client_options

SECONDS: Final = 10.0


class Commit(NamedTuple):
    """A committed position and the metadata string beside it."""

    position: int
    metadata: str


async def committed(
    connection: KafkaConnection, group_id: str, topic: str, partitions: Collection[int]
) -> dict[int, Commit | None]:
    """The group's commit for each of `partitions`, None where there is none.

    Raises KafkaError, OSError or TimeoutError when the coordinator cannot say.
    """
    asked = [TopicPartition(topic, partition) for partition in partitions]
    admin = AIOKafkaAdminClient(**client_options(connection))
    try:
        async with asyncio.timeout(SECONDS):
            await admin.start()
            answers = await admin.list_consumer_group_offsets(group_id, partitions=asked)
    finally:
        await admin.close()
    if missing := [wanted.partition for wanted in asked if wanted not in answers]:
        raise GroupLoadInProgressError(f"no answer for partitions {missing} of {topic}")
    return {
        wanted.partition: Commit(answers[wanted].offset, answers[wanted].metadata or "")
        if answers[wanted].offset >= 0
        else None
        for wanted in asked
    }
