"""The token deltas of one request, on the stream topic."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from typing import Final

from loramux_schemas import ReplyRoute, Request, StreamDelta
from loramux_worker.kafka.records import OutgoingRecord

PACE_SECONDS: Final = 0.025  # between two deltas of one request: faster than anybody reads


class DeltaStream:
    """Deltas of one request: the first at once, the others at a pace, each with all that came since the last.

    Tokens whose text is held back travel with the next text that comes. A delta costs worker, broker and reader about
    as much whether it has one token or five.
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
        self._pieces: list[str] = []
        self._due = 0.0

    @property
    def rest(self) -> float:
        """Seconds until the next delta may go."""
        return self._due - time.monotonic()

    def push(self, token_id: int, piece: str) -> None:
        """A token came, and with it a piece of text that may be empty."""
        self._tokens.append(token_id)
        if piece:
            self._pieces.append(piece)

    async def send(self) -> None:
        """Send what came, if there is text in it."""
        if self._pieces:
            await self._send()

    async def finish(self, rest: str) -> None:
        """The answer is complete; `rest` is the text that was held back."""
        self._pieces.append(rest)
        if rest or self._tokens:
            await self._send()

    async def _send(self) -> None:
        text, tokens = "".join(self._pieces), tuple(self._tokens)
        delta = StreamDelta(request_id=self._request_id, index=self._index, text=text, token_ids=tokens)
        await self._post(OutgoingRecord(self._topic, self._request_id.encode(), delta.to_json(), self._echo))
        self._index += 1
        self._tokens, self._pieces = [], []
        self._due = time.monotonic() + PACE_SECONDS
