"""Metadata: what a request carries for its reply."""

from __future__ import annotations

from typing import Annotated, Any, Final

import orjson
from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

MAX_METADATA_BYTES: Final = 16 * 1024
MAX_METADATA_DEPTH: Final = 64

# JSON and nothing else: no dates, dataclasses or enums that would come back as something different.
_JSON_ONLY = orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_SUBCLASS


def valid_metadata(value: object) -> dict[str, Any]:
    """The object as it will be echoed; raises `PydanticCustomError` if it is no JSON object or too big."""
    if not isinstance(value, dict):
        raise PydanticCustomError("metadata", "must be an object")
    try:
        encoded = orjson.dumps(value, option=_JSON_ONLY)
    except TypeError:
        raise PydanticCustomError("metadata", "holds something that is not JSON, or is nested too deeply") from None
    if len(encoded) > MAX_METADATA_BYTES:
        raise PydanticCustomError("metadata", "is longer than {limit} bytes as JSON", {"limit": MAX_METADATA_BYTES})
    if _nests_deeper_than(MAX_METADATA_DEPTH, value):
        raise PydanticCustomError("metadata", "is nested deeper than {limit} levels", {"limit": MAX_METADATA_DEPTH})
    decoded: dict[str, Any] = orjson.loads(encoded)
    if decoded != value:
        raise PydanticCustomError("metadata", "holds something that JSON cannot carry")
    return decoded


def _nests_deeper_than(limit: int, value: object) -> bool:
    level = [value]
    for _ in range(limit):
        children: list[object] = []
        for item in level:
            if isinstance(item, dict):
                children.extend(item.values())
            elif isinstance(item, list):
                children.extend(item)
        if not children:
            return False
        level = children
    return any(isinstance(item, dict | list) for item in level)


Metadata = Annotated[dict[str, Any], AfterValidator(valid_metadata)]
