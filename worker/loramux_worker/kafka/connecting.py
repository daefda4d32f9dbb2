"""The first contact with a broker: tried again until it works or the start-up time is over."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol, TypeVar

from aiokafka.admin import AIOKafkaAdminClient
from aiokafka.errors import KafkaError

from loramux_schemas import KafkaConnection
from loramux_schemas.handshake import diagnose
from loramux_worker.errors import ConfigurationError
from loramux_worker.kafka.outage import Outage, explain

RETRY_SECONDS: Final = 0.5

# What a client raises while a broker is away, starting or unwilling.
TROUBLE: Final = (KafkaError, OSError, TimeoutError)


class Client(Protocol):
    """Any aiokafka client that has not been started."""

    async def start(self) -> None:
        """Finds the cluster; raises KafkaError when nobody answers."""


C = TypeVar("C", bound=Client)


def client_options(connection: KafkaConnection) -> dict[str, Any]:
    """`connection.client_options()`; an unreadable file or a missing package is a ConfigurationError."""
    try:
        return connection.client_options()
    except ValueError as error:
        raise ConfigurationError(str(error)) from None


async def started(
    connection: KafkaConnection,
    make: Callable[[], C],
    discard: Callable[[C], Awaitable[object]],
    *,
    timeout: float,
) -> C:
    """A started client. A client whose start failed is discarded and made anew.

    Raises ConfigurationError when no broker answers within `timeout` seconds, and soon when one answers that it
    will not have us.
    """
    servers = connection.bootstrap_servers
    outage = Outage("start")
    reason = "no answer"
    try:
        async with asyncio.timeout(timeout):
            while True:
                client = make()
                try:
                    await client.start()
                    outage.over()
                    return client
                except BaseException as error:
                    await discard(client)
                    if not isinstance(error, TROUBLE):
                        raise
                    reason = explain(error)
                    outage.failed(f"connecting to {servers}", error)
                await asyncio.sleep(RETRY_SECONDS)
                # A second look: what a broker does while it goes down looks like a refusal for a moment.
                if (diagnosis := await diagnose(connection)) is not None:
                    if diagnosis.permanent:
                        raise ConfigurationError(f"--bootstrap-servers: {diagnosis.reason}")
                    reason = diagnosis.reason
    except TimeoutError:
        raise ConfigurationError(
            f"--bootstrap-servers: no Kafka broker answered at {servers} within {timeout:g} s ({reason})"
        ) from None


async def started_admin(connection: KafkaConnection, *, timeout: float) -> AIOKafkaAdminClient:
    """A started administration client; the caller closes it. Raises ConfigurationError as `started` does."""
    options = client_options(connection)
    return await started(
        connection,
        lambda: AIOKafkaAdminClient(**options),
        lambda client: client.close(),
        timeout=timeout,
    )
