"""The error of an adapter that cannot be served as PEFT would run it, and how its files are quoted in it."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from loramux_schemas import ErrorCode
from loramux_worker.errors import RequestFailed

_MAX_QUOTED_CHARS = 160


class AdapterInvalid(RequestFailed):
    """Something is wrong with an adapter's files; `reason` is one line that names it."""

    def __init__(self, reason: str) -> None:
        super().__init__(ErrorCode.ADAPTER_INVALID, reason)
        self.reason = reason


def quoted(value: object) -> str:
    """A name or value out of an adapter's files, fit for one line: ASCII, printable and not long."""
    text = ascii(value)
    return text if len(text) <= _MAX_QUOTED_CHARS else text[:_MAX_QUOTED_CHARS] + "…"


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """A JSON object without duplicate keys, NaN or infinities.

    Raises:
        AdapterInvalid: anything else, whatever the bytes are; the reason begins with `where`.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) != len(pairs):
            twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
            raise AdapterInvalid(f"{where}: {quoted(twice)} stands there twice")
        return members

    def not_a_number(constant: str) -> Any:
        raise AdapterInvalid(f"{where}: {constant} is not JSON")

    try:
        parsed = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=not_a_number)
    except (ValueError, RecursionError) as error:
        raise AdapterInvalid(f"{where}: not valid JSON ({quoted(str(error))})") from None
    if not isinstance(parsed, dict):
        raise AdapterInvalid(f"{where}: not a JSON object")
    return parsed
