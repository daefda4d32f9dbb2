"""One streamed request, as an asynchronous iterator of its deltas."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

from loramux_producer.deltas import DeltaBuffer
from loramux_producer.pending import OnDelta, PendingReply
from loramux_schemas import Reply, Request, StreamDelta


class ReplyStream(AsyncIterator[StreamDelta]):
    """Yields the deltas of one request in order, each once, and ends with its final reply, then in `reply`.

    The request is produced at the first step. Raises, at any step, what `Client.generate` raises. Whoever
    leaves the iteration early may call `aclose()` to stop waiting for the reply.
    """

    def __init__(self, request: Request, ask: Callable[[OnDelta], Awaitable[PendingReply]]) -> None:
        self.request = request
        self.reply: Reply | None = None
        self._ask = ask
        self._buffer = DeltaBuffer(request)
        self._future: asyncio.Future[Reply] | None = None
        self._news = asyncio.Event()
        self._ended = False

    async def __anext__(self) -> StreamDelta:
        if self._ended:
            raise StopAsyncIteration
        if self._future is None:
            self._future = await self._begin()
        while True:
            delta = self._buffer.pop()
            if delta is not None:
                return delta
            if self._future.done():
                return self._last(self._future)
            self._news.clear()
            await self._news.wait()

    async def aclose(self) -> None:
        """Wait no longer: the iteration is over, and what still comes is ignored."""
        self._ended = True
        if self._future is not None:
            self._future.cancel()

    async def _begin(self) -> asyncio.Future[Reply]:
        # Whatever goes wrong here, the next step must not produce the request once more.
        self._ended = True
        pending = await self._ask(self._take)
        self._ended = False
        pending.future.add_done_callback(lambda _: self._news.set())
        return pending.future

    def _take(self, delta: StreamDelta) -> None:
        self._buffer.push(delta)
        self._news.set()

    def _last(self, future: asyncio.Future[Reply]) -> StreamDelta:
        self._ended = True
        self.reply = future.result()
        rest = self._buffer.rest(self.reply)
        if rest is None:
            raise StopAsyncIteration
        return rest
