"""Error codes of the contract, and the errors of reading a message.

SchemaError
├── InvalidRequest       a JSON object with a readable request_id: it is answered with `invalid_request`
└── UnparseableMessage   anything else: it goes to the dead-letter topic
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Any

from pydantic import ValidationError

_MAX_NAME_CHARS = 64

# pydantic's wordings speak of Python ("valid tuple"); the reader of a reply has JSON in mind.
_WORDINGS = {
    "bool_type": "must be true or false",
    "dict_type": "must be an object",
    "extra_forbidden": "unknown field",
    "finite_number": "must be a finite number",
    "float_type": "must be a number",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_type": "must be an integer",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "missing": "is required",
    "model_type": "must be an object",
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must not be empty",
    "string_type": "must be a string",
    "too_long": "must have at most {max_length} items",
    "too_short": "must not be empty",
    "tuple_type": "must be an array",
}


class ErrorCode(StrEnum):
    """Why a request has no text: the `error.code` of a reply."""

    INVALID_REQUEST = "invalid_request"
    FORBIDDEN = "forbidden"
    ADAPTER_NOT_FOUND = "adapter_not_found"
    ADAPTER_INVALID = "adapter_invalid"
    ADAPTER_UNAVAILABLE = "adapter_unavailable"
    CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    CANCELLED = "cancelled"
    INTERNAL = "internal"

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed when it is sent again."""
        return self in (ErrorCode.ADAPTER_UNAVAILABLE, ErrorCode.INTERNAL)


class SchemaError(Exception):
    """Base of the errors of reading a message."""


class InvalidRequest(SchemaError):
    """A request that can be answered but not run.

    `message` is one line that begins with the field's name. `adapter_id` (without the pin) and `metadata` are
    what the reply echoes: None where the request has none that is valid.
    """

    def __init__(
        self,
        message: str,
        request_id: str,
        adapter_id: str | None = None,
        metadata: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.request_id = request_id
        self.adapter_id = adapter_id
        self.metadata = metadata


class UnparseableMessage(SchemaError):
    """Bytes that are no request: not JSON, no object, no readable request_id. `reason` is one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def describe(error: ValidationError) -> str:
    """One line for the first thing wrong: the field's path, a colon, the reason, how many more there are.

    An error that a validator of a whole model raises names its field in the context (`field`), since pydantic
    knows only the model's own place. Values are never quoted: they may be somebody's prompt.
    """
    details = error.errors(include_url=False, include_input=False)
    first = details[0]
    path: list[str | int] = list(first["loc"])
    field = first.get("ctx", {}).get("field")
    if isinstance(field, str):
        path.append(field)
    reason = _WORDINGS.get(first["type"], first["msg"]).format_map(first.get("ctx", {}))
    more = f" (and {len(details) - 1} more)" if len(details) > 1 else ""
    return f"{field_path(path)}: {reason}{more}"


def field_path(path: Iterable[str | int]) -> str:
    """`("parameters", "stop", 3)` as `parameters.stop.3`; `message` for the empty path."""
    joined = ".".join(printable(str(part), limit=_MAX_NAME_CHARS) for part in path)
    return printable(joined, limit=256) or "message"


def printable(text: str, limit: int) -> str:
    """Text from outside, fit for one line of a log or a reply: printable, and cut to `limit` characters."""
    shown = text if len(text) <= limit else text[: limit - 1] + "…"
    return "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in shown)
