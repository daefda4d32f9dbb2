"""From keyword arguments to a valid request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

from pydantic import ValidationError

from loramux_producer.ids import new_request_id
from loramux_schemas import ChatMessage, Request, describe


class RequestFields(TypedDict, total=False):
    """What a request may hold beside its prompt; the generation parameters stand beside the other fields."""

    adapter_id: str | None
    messages: Sequence[ChatMessage | Mapping[str, Any]] | None
    prompt_token_ids: Sequence[int] | None
    request_id: str | None
    stream: bool
    priority: int
    deadline_ms: int | None
    metadata: dict[str, Any] | None

    max_new_tokens: int
    min_new_tokens: int
    ignore_eos: bool
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    do_sample: bool
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    seed: int | None
    stop: Sequence[str]
    stop_token_ids: Sequence[int]
    logprobs: int | None
    return_full_text: bool
    truncate: int | None
    skip_special_tokens: bool


def build_request(prompt: str | None = None, **fields: Unpack[RequestFields]) -> Request:
    """The request of these arguments, with a new UUIDv7 as its id unless one is given.

    Raises `ValueError` in one line that begins with the name of the field.
    """
    message: dict[str, Any] = {"prompt": prompt}
    parameters: dict[str, Any] = {}
    for name, value in fields.items():
        (message if name in Request.model_fields else parameters)[name] = value
    if message.get("request_id") is None:
        message["request_id"] = new_request_id()
    try:
        return Request.model_validate({**message, "parameters": parameters})
    except ValidationError as error:
        raise ValueError(describe(error)) from None
