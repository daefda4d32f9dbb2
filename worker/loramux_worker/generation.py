"""One request's tokens as an engine produces them."""

from __future__ import annotations

import asyncio

import msgspec

from loramux_worker.engine.protocol import SequenceOutput, SequenceTiming, Submit, TokenLogprobs
from loramux_worker.errors import RequestFailed


class Generation:
    """Collects the tokens of one sequence; survives the engine that began it.

    `token_ids` only grows. `finish_reason` is set with the last token.
    """

    def __init__(self, submit: Submit) -> None:
        self._submit = submit
        self._changed = asyncio.Event()
        self._awaited = 0  # tokens beyond which somebody wants to know
        self._error: RequestFailed | None = None
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs | None] = []
        self.finish_reason: str | None = None
        self.timing: SequenceTiming | None = None
        self.engine_deaths = 0

    @property
    def sequence_id(self) -> int:
        """The engine's name for it."""
        return self._submit.sequence_id

    @property
    def is_done(self) -> bool:
        """Whether the last word about it has been said."""
        return self.finish_reason is not None or self._error is not None

    def submission(self) -> Submit:
        """What to tell an engine: the request and the tokens that it has already."""
        return msgspec.structs.replace(self._submit, generated_token_ids=list(self.token_ids))

    def add(self, output: SequenceOutput) -> None:
        """Take in one step's token."""
        self.token_ids.append(output.token_id)
        self.logprobs.append(output.logprobs)
        self.finish_reason = output.finish_reason
        if self.finish_reason is not None or len(self.token_ids) > self._awaited:
            self._changed.set()

    def fail(self, error: RequestFailed) -> None:
        """End it with an error."""
        self._error = error
        self._changed.set()

    async def wait_beyond(self, num_tokens: int) -> None:
        """Wait until there are more than `num_tokens` tokens or it has ended.

        Raises:
            RequestFailed: it ended without an answer.
        """
        self._awaited = num_tokens
        while len(self.token_ids) <= num_tokens and not self.is_done:
            self._changed.clear()
            await self._changed.wait()
        if self._error is not None:
            raise self._error
