"""From bytes to a JSON object, whatever the bytes are."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import orjson

from loramux_schemas.errors import UnparseableMessage, field_path, printable

MAX_ECHOED_REQUEST_ID_CHARS = 4096

_MAX_FIELDS = 64


def parse_object(value: bytes | None) -> tuple[dict[str, Any], str | None]:
    """Parse the value of a record: a JSON object whose `request_id` is a string.

    The second item is None, or one line for a number or string in the object that strict JSON does not have
    (`NaN`, `1e999`, half of a surrogate pair): such a message can be answered, but not run. Raises
    `UnparseableMessage`.
    """
    if value is None:
        raise UnparseableMessage("no value: a tombstone is not a request")
    try:
        return _with_request_id(orjson.loads(value)), None
    except orjson.JSONDecodeError as error:
        payload = _parse_leniently(value, str(error))
        return payload, _what_is_wrong(payload) or f"message: {error}"


def _with_request_id(payload: object) -> dict[str, Any]:
    if not isinstance(payload, dict):
        raise UnparseableMessage(f"not a JSON object but {_JSON_NAMES.get(type(payload), 'something else')}")
    if "request_id" not in payload:
        raise UnparseableMessage("request_id: missing")
    request_id = payload["request_id"]
    if not isinstance(request_id, str):
        raise UnparseableMessage("request_id: not a string")
    if len(request_id) > MAX_ECHOED_REQUEST_ID_CHARS or _has_surrogate(request_id):
        raise UnparseableMessage(f"request_id: not readable text of at most {MAX_ECHOED_REQUEST_ID_CHARS} characters")
    return payload


def _parse_leniently(value: bytes, reason: str) -> dict[str, Any]:
    """Read what orjson refuses, with the standard library, only to answer it; raises `UnparseableMessage`."""
    try:
        text = value.decode()
    except UnicodeDecodeError as error:
        raise UnparseableMessage(f"not UTF-8: {error.reason} at byte {error.start}") from None
    try:
        payload = json.loads(text, parse_int=_integer, parse_constant=float)
    except RecursionError:
        raise UnparseableMessage("not JSON: nested too deeply") from None
    except ValueError:
        raise UnparseableMessage(f"not JSON: {printable(reason, limit=200)}") from None
    return _with_request_id(payload)


def _integer(digits: str) -> int | float:
    """Python refuses integers beyond 4,300 digits; no field takes one beyond 19."""
    return int(digits) if len(digits) < 20 else float(digits)


def _what_is_wrong(payload: dict[str, Any]) -> str | None:
    """Name the field that strict JSON does not have, as exactly as objects go; None if none is found.

    Looks at no more fields than a request has, each in one go of a C encoder: quick whatever the message.
    """
    path: list[str] = []
    value: object = payload
    while isinstance(value, dict) and len(path) < 3:
        for name, item in islice(value.items(), _MAX_FIELDS):
            if (reason := _fault(item)) is not None:
                path.append(name)
                value = item
                break
        else:
            break
    return None if not path else f"{field_path(path)}: {reason}"


def _fault(value: object) -> str | None:
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return "holds half of a surrogate pair, which is not text"
    except ValueError:
        return "must be a finite number" if isinstance(value, float) else "holds a number that is not finite"
    except RecursionError:
        return "nested too deeply"
    return None


def _has_surrogate(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


_JSON_NAMES = {
    list: "an array",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    type(None): "null",
}
