"""The topics that a worker needs: there, or created, or an error at start that names the setting."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from typing import Final

import structlog
from aiokafka.admin import AIOKafkaAdminClient, NewTopic
from aiokafka.admin.config_resource import ConfigResource, ConfigResourceType
from aiokafka.errors import NoError, TopicAlreadyExistsError, for_code

from loramux_schemas import KafkaConnection
from loramux_worker.errors import ConfigurationError
from loramux_worker.kafka.connecting import TROUBLE, started_admin
from loramux_worker.kafka.outage import explain

NEW_TOPIC_PARTITIONS: Final = 12
NEW_TOPIC_REPLICAS: Final = 3  # or as many as there are brokers
CREATE_SECONDS: Final = 15.0

log = structlog.get_logger(__name__)


async def ensure_topics(
    connection: KafkaConnection,
    topics: Mapping[str, str],
    *,
    create: bool,
    startup_timeout: float,
    partitions: int = NEW_TOPIC_PARTITIONS,
) -> None:
    """Returns when every topic is there. `topics`: the flag that names a topic → the topic.

    With `create` a missing topic is created with `partitions` partitions. Raises ConfigurationError when no
    broker answers within `startup_timeout` seconds, or for a topic that is missing or cannot be created.
    """
    admin = await started_admin(connection, timeout=startup_timeout)
    try:
        there = set(await admin.list_topics())
        for flag, topic in topics.items():
            if topic in there:
                continue
            if not create:
                raise ConfigurationError(
                    f"{flag}: there is no topic '{topic}' on {connection.bootstrap_servers}: "
                    "create it, or pass --create-topics"
                )
            await create_topic(admin, flag, topic, partitions)
            there.add(topic)
    except TROUBLE as error:
        raise ConfigurationError(
            f"--bootstrap-servers: {connection.bootstrap_servers} did not list its topics ({explain(error)})"
        ) from None
    finally:
        await admin.close()


async def create_topic(admin: AIOKafkaAdminClient, flag: str, topic: str, partitions: int) -> None:
    """Creates a topic and waits until the cluster lists it. Raises ConfigurationError naming `flag`."""
    reason = "it did not appear"
    try:
        async with asyncio.timeout(CREATE_SECONDS):
            brokers = (await admin.describe_cluster())["brokers"]
            asked = NewTopic(topic, partitions, min(NEW_TOPIC_REPLICAS, len(brokers)))
            try:
                answer = await admin.create_topics([asked])
            except (AttributeError, *TROUBLE) as error:
                # A broker without a controller, as librdkafka's mock cluster: it creates topics that are
                # asked for.
                reason = explain(error)
            else:
                [(_, code, *message)] = answer.topic_errors
                if for_code(code) not in (NoError, TopicAlreadyExistsError):
                    detail = message[0] if message and message[0] else for_code(code).__name__
                    raise ConfigurationError(f"{flag}: cannot create topic '{topic}': {detail}")
            while not await has_leaders(admin, topic):  # noqa: ASYNC110 - the cluster tells nobody
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise ConfigurationError(f"{flag}: cannot create topic '{topic}': {reason}") from None
    log.info("topic_created", topic=topic, partitions=partitions)


async def has_leaders(admin: AIOKafkaAdminClient, topic: str) -> bool:
    """Whether the topic is there and each of its partitions has a leader."""
    [described] = await admin.describe_topics([topic])
    leaders = [partition["leader"] for partition in described["partitions"]]
    return bool(leaders) and -1 not in leaders


async def largest_messages(admin: AIOKafkaAdminClient, topics: Iterable[str]) -> dict[str, int]:
    """Topic → `max.message.bytes`, of the topics whose configuration the broker shows."""
    asked = [ConfigResource(ConfigResourceType.TOPIC, topic, {"max.message.bytes": None}) for topic in topics]
    try:
        answers = await admin.describe_configs(asked) if asked else []
    except TROUBLE as error:
        log.info("topic_limits_unknown", reason=explain(error))
        return {}
    return {
        topic: int(entries[0][1])
        for answer in answers
        for code, _, _, topic, entries in answer.resources
        if for_code(code) is NoError and entries
    }
