"""Produces cancellations on the control topic, from the first one on: who never cancels needs no such topic."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from loramux_producer.errors import ClientClosed
from loramux_producer.sender import RequestSender
from loramux_schemas import Cancellation


class Canceller:
    """The control topic's producer.

    `connecting` awaits what connects, and says in a ClientError why it could not; `require_topic` raises one for a
    topic that is missing. `options` are keyword arguments of an aiokafka client.
    """

    def __init__(
        self,
        topic: str,
        options: Mapping[str, Any],
        connecting: Callable[[Awaitable[None]], Awaitable[None]],
        require_topic: Callable[[str], Awaitable[None]],
    ) -> None:
        self._topic = topic
        self._options = options
        self._connecting = connecting
        self._require_topic = require_topic
        self._sender: RequestSender | None = None
        self._starting = asyncio.Lock()
        self._closed = False

    async def send(self, cancellation: Cancellation) -> None:
        """Returns once Kafka has it. Raises ClientError, ClientClosed."""
        sender = await self._started()
        key = cancellation.request_id.encode()
        await sender.send(partition=None, key=key, value=cancellation.to_json(), headers=[])

    async def close(self) -> None:
        """Disconnect."""
        self._closed = True
        async with self._starting:
            if self._sender is not None:
                await self._sender.close()

    async def _started(self) -> RequestSender:
        async with self._starting:
            if self._closed:
                raise ClientClosed("the client is closed")
            if self._sender is None:
                await self._connecting(self._require_topic(self._topic))
                sender = RequestSender(self._topic, self._options)
                await self._connecting(sender.start())
                self._sender = sender
            return self._sender
