"""The client of loramux: asks adapters through Kafka and awaits their replies. Needs no torch.

For example:

    async with Client("localhost:9092") as client:
        reply = await client.generate("Hello", adapter_id="acme/support")
"""

from __future__ import annotations

from loramux_producer.client import Client
from loramux_producer.errors import ClientClosed, ClientError, ReplyFailed, ReplyTimeout, RequestTooLarge
from loramux_producer.ids import new_request_id
from loramux_producer.partitions import shard_partitions
from loramux_producer.stream import ReplyStream

__all__ = [
    "Client",
    "ClientClosed",
    "ClientError",
    "ReplyFailed",
    "ReplyStream",
    "ReplyTimeout",
    "RequestTooLarge",
    "new_request_id",
    "shard_partitions",
]
