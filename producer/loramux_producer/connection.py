"""From settings to a Kafka connection, with errors that a person can read."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, Final

from aiokafka.errors import KafkaConnectionError, KafkaError
from pydantic import ValidationError

from loramux_producer.errors import ClientError
from loramux_schemas import KafkaConnection
from loramux_schemas.handshake import diagnose

DEFAULT_SERVERS: Final = "localhost:9092"


def kafka_connection(**settings: Any) -> KafkaConnection:
    """The connection of these settings; raises `ValueError` in one line that names the setting."""
    try:
        return KafkaConnection(**settings)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        reason = first["msg"].removeprefix("Value error, ")
        # What concerns several settings has no place of its own, and names them.
        raise ValueError(": ".join([*map(str, first["loc"]), reason])) from None


async def connecting(awaited: Awaitable[None], *, connection: KafkaConnection, seconds: float) -> None:
    """Await what connects to Kafka. Raises ClientError in one line, also after `seconds`."""
    servers = connection.bootstrap_servers
    try:
        async with asyncio.timeout(seconds):
            await awaited
    except TimeoutError as error:
        raise ClientError(f"Kafka at {servers} did not answer within {seconds:g} s") from error
    except (KafkaConnectionError, OSError) as error:
        raise ClientError(await _why_unreachable(connection)) from error
    except KafkaError as error:
        raise ClientError(f"Kafka at {servers}: {error}") from error


async def _why_unreachable(connection: KafkaConnection) -> str:
    diagnosis = await diagnose(connection)
    if diagnosis is not None and diagnosis.permanent:
        return f"Kafka refuses this client: {diagnosis.reason}"
    reason = f" ({diagnosis.reason})" if diagnosis is not None else ""
    return f"no Kafka broker answers at {connection.bootstrap_servers}{reason}"
