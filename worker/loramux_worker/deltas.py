"""The token deltas of one request, on the stream topic."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from loramux_schemas import ReplyRoute, Request, StreamDelta
from loramux_worker.kafka.records import OutgoingRecord


class DeltaStream:
    """Deltas of one request: tokens whose text is held back travel with the next text that comes.

    What is in a delta follows from the tokens alone, never from the time: another worker that takes the request over
    begins again, and a reader passes over the indices that it has.
    """

    def __init__(
        self,
        request: Request,
        route: ReplyRoute,
        topic: str,
        post: Callable[[OutgoingRecord], Awaitable[None]],
    ) -> None:
        self._request_id = request.request_id
        self._echo = route.echo
        self._topic = topic
        self._post = post
        self._index = 0
        self._tokens: list[int] = []

    async def push(self, token_id: int, piece: str) -> None:
        """A token came, and with it a piece of text that may be empty."""
        self._tokens.append(token_id)
        if piece:
            await self._send(piece)

    async def finish(self, rest: str) -> None:
        """The answer is complete; `rest` is the text that was held back."""
        if rest or self._tokens:
            await self._send(rest)

    async def _send(self, text: str) -> None:
        delta = StreamDelta(request_id=self._request_id, index=self._index, text=text, token_ids=tuple(self._tokens))
        await self._post(OutgoingRecord(self._topic, self._request_id.encode(), delta.to_json(), self._echo))
        self._index += 1
        self._tokens = []
