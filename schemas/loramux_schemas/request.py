"""The request: one message on the requests topic."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Final, Self

import orjson
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import PydanticCustomError

from loramux_schemas.adapter_names import MAX_ADAPTER_NAME_CHARS, AdapterName
from loramux_schemas.errors import InvalidRequest, describe, printable
from loramux_schemas.metadata import Metadata, valid_metadata
from loramux_schemas.parsing import parse_object

MAX_REQUEST_ID_CHARS: Final = 256
MAX_MESSAGES: Final = 4096
MAX_STOP_STRINGS: Final = 16
MAX_STOP_CHARS: Final = 256
MAX_STOP_TOKEN_IDS: Final = 1024
MAX_LOGPROBS: Final = 20
MAX_INT32: Final = 2**31 - 1
MAX_INT64: Final = 2**63 - 1


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("text", "holds half of a surrogate pair, which is not text") from None
    return value


def _adapter_id(value: str) -> str:
    try:
        AdapterName.parse(value)
    except ValueError as error:
        raise PydanticCustomError("adapter_id", "{reason}", {"reason": str(error)}) from None
    return value


def _not_empty(value: tuple[Any, ...]) -> tuple[Any, ...]:
    # pydantic's own min_length counts only what came before the first error, and says so as a second error.
    if not value:
        raise PydanticCustomError("empty", "must not be empty")
    return value


def _joined_content(value: object) -> object:
    """Take `[{"type": "text", "text": …}, …]`, as chat APIs send it, for the text it stands for."""
    if not isinstance(value, list | tuple):
        return value
    for part in value:
        if not (isinstance(part, Mapping) and part.keys() == {"type", "text"} and part["type"] == "text"):
            raise PydanticCustomError("content", 'a part must have a type, "text", and a text')
        if not isinstance(part["text"], str):
            raise PydanticCustomError("content", "the text of a part must be a string")
    return "".join(part["text"] for part in value)


Text = Annotated[str, AfterValidator(_text)]
TokenId = Annotated[int, Field(ge=0, le=MAX_INT32)]
StopString = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Content = Annotated[
    Text,
    BeforeValidator(_joined_content),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string"},
                {
                    "type": "array",
                    "items": {
                        "type": "object",
                        "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
                        "required": ["type", "text"],
                        "additionalProperties": False,
                    },
                },
            ]
        }
    ),
]


class _Wire(BaseModel):
    """What the parts of a request share: strict types, no unknown field, null means absent, second names."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
    aliases: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: object) -> object:
        if not isinstance(data, dict):
            return data
        fields: dict[str, object] = {}
        for given, value in data.items():
            name = cls.aliases.get(given, given)
            if name not in cls.model_fields:
                raise _wrong(given, "unknown_field", f"unknown field{cls._suggestion(given)}")
            if value is None:
                continue
            if name in fields:
                raise _wrong(given, "named_twice", f"is another name for {cls._other_name(given)}: give one of them")
            fields[name] = value
        return fields

    @classmethod
    def _suggestion(cls, given: object) -> str:
        names = [*cls.model_fields, *cls.aliases]
        close = get_close_matches(given, names, n=1) if isinstance(given, str) and len(given) <= 64 else []
        return f" (did you mean {close[0]}?)" if close else ""

    @classmethod
    def _other_name(cls, given: str) -> str:
        return {**cls.aliases, **{name: alias for alias, name in cls.aliases.items()}}[given]


def _wrong(field: object, kind: str, reason: str) -> PydanticCustomError:
    """An error of one field that is found while looking at the whole model; `describe` appends the field."""
    shown = printable(str(field), limit=64)
    return PydanticCustomError(kind, "{reason}", {"field": shown, "reason": reason})


class ChatMessage(_Wire):
    """One turn of a conversation. `content` may come as a list of text parts; it is kept as one string."""

    role: Annotated[Text, Field(min_length=1, max_length=64)]
    content: Content


Conversation = Annotated[
    tuple[Annotated[ChatMessage, Field(strict=False)], ...],
    Field(strict=False, max_length=MAX_MESSAGES, fail_fast=True),
    AfterValidator(_not_empty),
]
TokenIds = Annotated[tuple[TokenId, ...], Field(strict=False, fail_fast=True), AfterValidator(_not_empty)]


class Parameters(_Wire):
    """How to generate. `do_sample=False` or `temperature=0` is greedy; `max_tokens` is `max_new_tokens`."""

    aliases: ClassVar[Mapping[str, str]] = {"max_tokens": "max_new_tokens"}

    max_new_tokens: int = Field(default=256, ge=1, le=MAX_INT32)
    min_new_tokens: int = Field(default=0, ge=0, le=MAX_INT32)
    ignore_eos: bool = False
    temperature: float = Field(default=1.0, ge=0, le=100)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0, le=MAX_INT32, description="0: every token")
    min_p: float = Field(default=0.0, ge=0, le=1)
    do_sample: bool = False
    repetition_penalty: float = Field(default=1.0, gt=0, le=1000)
    presence_penalty: float = Field(default=0.0, ge=-2, le=2)
    frequency_penalty: float = Field(default=0.0, ge=-2, le=2)
    seed: int | None = Field(default=None, ge=0, le=MAX_INT64)
    stop: tuple[StopString, ...] = Field(default=(), strict=False, max_length=MAX_STOP_STRINGS, fail_fast=True)
    stop_token_ids: tuple[TokenId, ...] = Field(default=(), strict=False, max_length=MAX_STOP_TOKEN_IDS, fail_fast=True)
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LOGPROBS,
        description="n: the top-n log-probabilities of each generated token",
    )
    return_full_text: bool = False
    truncate: int | None = Field(default=None, ge=1, le=MAX_INT32, description="keep the last n prompt tokens")
    skip_special_tokens: bool = True

    @model_validator(mode="after")
    def _lengths_agree(self) -> Self:
        if self.min_new_tokens > self.max_new_tokens:
            reason = f"must not exceed max_new_tokens ({self.max_new_tokens})"
            raise _wrong("min_new_tokens", "lengths", reason)
        return self

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return not self.do_sample or self.temperature == 0


class Request(_Wire):
    """One request. Exactly one of `prompt` (also `inputs`), `messages` and `prompt_token_ids` is given.

    null stands for an absent field.

    Raises pydantic's `ValidationError`; `from_json` raises the two errors of reading a message instead.
    """

    aliases: ClassVar[Mapping[str, str]] = {"inputs": "prompt"}

    request_id: Annotated[Text, Field(min_length=1, max_length=MAX_REQUEST_ID_CHARS)]
    adapter_id: Annotated[str, AfterValidator(_adapter_id)] | None = Field(
        default=None,
        description='null: the base model; "name@revision" pins a revision',
        json_schema_extra={"maxLength": MAX_ADAPTER_NAME_CHARS},
    )
    prompt: Text | None = None
    messages: Conversation | None = Field(default=None, json_schema_extra={"minItems": 1})
    prompt_token_ids: TokenIds | None = Field(default=None, json_schema_extra={"minItems": 1})
    parameters: Annotated[Parameters, Field(strict=False)] = Parameters()
    stream: bool = Field(default=False, description="token deltas on the stream topic as they come")
    priority: int = Field(default=0, ge=-1000, le=1000, description="higher first inside one adapter's queue")
    deadline_ms: int | None = Field(default=None, ge=0, le=MAX_INT64, description="Unix time in milliseconds")
    metadata: Metadata | None = Field(
        default=None, description="echoed in the reply; at most 16 KiB as JSON, 64 levels"
    )

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        given = [name for name in ("prompt", "messages", "prompt_token_ids") if getattr(self, name) is not None]
        if not given:
            raise _wrong("prompt", "one_prompt", "one of prompt, messages and prompt_token_ids is required")
        if len(given) > 1:
            raise _wrong(given[1], "one_prompt", f"given together with {given[0]}: exactly one is allowed")
        return self

    @property
    def adapter(self) -> AdapterName | None:
        """The adapter that is asked for; None is the base model."""
        return None if self.adapter_id is None else AdapterName.parse(self.adapter_id)

    @classmethod
    def from_json(cls, value: bytes | None) -> Self:
        """Read the value of a record.

        Raises `InvalidRequest` for a JSON object with a readable request_id and `UnparseableMessage` for
        anything else; nothing but these two, whatever the bytes.
        """
        payload, fault = parse_object(value)
        if fault is not None:
            raise _rejected(payload, fault)
        try:
            return cls.model_validate(payload)
        except ValidationError as error:
            raise _rejected(payload, describe(error)) from None

    def to_json(self) -> bytes:
        """The value of a record; what is at its default is left out."""
        return orjson.dumps(self.model_dump(exclude_defaults=True))


def _rejected(payload: dict[str, Any], message: str) -> InvalidRequest:
    """An `InvalidRequest` that echoes as much of the request as is valid."""
    adapter_id = payload.get("adapter_id")
    try:
        adapter_id = AdapterName.parse(adapter_id).adapter_id if isinstance(adapter_id, str) else None
    except ValueError:
        adapter_id = None
    try:
        metadata = valid_metadata(payload.get("metadata"))
    except PydanticCustomError:
        metadata = None
    return InvalidRequest(message, payload["request_id"], adapter_id, metadata)
