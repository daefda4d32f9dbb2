"""The cancellation: one message on the control topic, which every worker reads."""

from __future__ import annotations

from typing import Annotated, Literal, Self

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from loramux_schemas.errors import UnparseableMessage, describe
from loramux_schemas.parsing import parse_object
from loramux_schemas.request import MAX_REQUEST_ID_CHARS, Text


class Cancellation(BaseModel):
    """Stop the request of this id, wherever it is: its one final reply has the code `cancelled`.

    A request that is answered already stays as it is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    type: Literal["cancel"]
    request_id: Annotated[Text, Field(min_length=1, max_length=MAX_REQUEST_ID_CHARS)]

    @classmethod
    def of(cls, request_id: str) -> Self:
        """The cancellation of a request; raises `ValueError` in one line for what is no request_id."""
        try:
            return cls(type="cancel", request_id=request_id)
        except ValidationError as error:
            raise ValueError(describe(error)) from None

    @classmethod
    def from_json(cls, value: bytes | None) -> Self:
        """Read the value of a record; raises `UnparseableMessage`, and nothing else, whatever the bytes."""
        payload, fault = parse_object(value)
        if fault is not None:
            raise UnparseableMessage(fault)
        try:
            return cls.model_validate(payload)
        except ValidationError as error:
            raise UnparseableMessage(describe(error)) from None

    def to_json(self) -> bytes:
        """The value of a record; its key is the request_id."""
        return orjson.dumps(self.model_dump())
