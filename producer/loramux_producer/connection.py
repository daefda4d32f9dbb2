"""From settings to a Kafka connection, with errors that a person can read."""

from __future__ import annotations

from typing import Any, Final

from pydantic import ValidationError

from loramux_schemas import KafkaConnection

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
