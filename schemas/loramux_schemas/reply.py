"""The reply: one final message on the replies topic; and the delta, a piece of text on its way there."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Any, Final, Literal, Self

import orjson
from pydantic import BaseModel, BeforeValidator, ConfigDict

from loramux_schemas.errors import ErrorCode

MIN_LOGPROB: Final = -9999.0


class FinishReason(StrEnum):
    """Why generation ended: length, the model's end of sequence, or a stop string or token of the request."""

    LENGTH = "length"
    EOS_TOKEN = "eos_token"  # noqa: S105 - a word of the contract
    STOP_SEQUENCE = "stop_sequence"


def _finite_logprob(value: object) -> object:
    """JSON has no infinity: the logarithm of probability 0 is written as `MIN_LOGPROB`."""
    return max(value, MIN_LOGPROB) if isinstance(value, float) else value


Logprob = Annotated[float, BeforeValidator(_finite_logprob)]


class _Answer(BaseModel):
    """What the parts of a reply share. A reader passes over fields that a newer worker may add."""

    model_config = ConfigDict(extra="ignore", frozen=True, json_schema_serialization_defaults_required=True)

    @classmethod
    def from_json(cls, value: bytes) -> Self:
        """Read the value of a record; raises `ValueError`."""
        return cls.model_validate(orjson.loads(value))

    def to_json(self) -> bytes:
        """The value of a record; every field is present."""
        return orjson.dumps(self.model_dump())


class Usage(_Answer):
    """Token counts; `completion_tokens` counts every generated token, end-of-sequence and stop tokens too."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


class Timing(_Answer):
    """Milliseconds: waiting in the queue, waiting for the adapter, prefill, decode, and all together."""

    queue_ms: float = 0.0
    adapter_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    total_ms: float = 0.0


class TopLogprob(_Answer):
    """One of the likeliest tokens at a position. Log-probabilities are the model's, before temperature."""

    id: int
    text: str
    logprob: Logprob


class TokenLogprob(_Answer):
    """A generated token, its log-probability, and the likeliest tokens at its position, likeliest first."""

    id: int
    text: str
    logprob: Logprob
    top: tuple[TopLogprob, ...] = ()


class ReplyError(_Answer):
    """Why there is no text."""

    code: ErrorCode
    message: str
    retryable: bool


class Reply(_Answer):
    """One reply; every field is present. `adapter_id` (without the pin) and `revision` are null for the base.

    `request_id` is null only where a message that could not be read is answered by its correlation header.
    `token_ids` holds every generated token; `generated_text` ends before the stop string.
    """

    request_id: str | None
    adapter_id: str | None = None
    revision: str | None = None
    status: Literal["ok", "error"] = "ok"
    generated_text: str | None = None
    token_ids: tuple[int, ...] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    timing: Timing | None = None
    worker: str | None = None
    metadata: dict[str, Any] | None = None
    error: ReplyError | None = None

    @classmethod
    def failure(
        cls,
        code: ErrorCode,
        message: str,
        *,
        request_id: str | None,
        adapter_id: str | None = None,
        worker: str | None = None,
        metadata: dict[str, Any] | None = None,
        timing: Timing | None = None,
    ) -> Self:
        """An error reply; whether it is retryable follows from the code."""
        return cls(
            request_id=request_id,
            adapter_id=adapter_id,
            status="error",
            worker=worker,
            metadata=metadata,
            timing=timing,
            error=ReplyError(code=code, message=message, retryable=code.retryable),
        )


class StreamDelta(_Answer):
    """A piece of the answer, on the stream topic. `index` counts from 0 within one request."""

    request_id: str
    index: int
    text: str
    token_ids: tuple[int, ...] = ()
