"""Requests that were made to harm, and any bytes at all."""

from __future__ import annotations

import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loramux_schemas import InvalidRequest, Parameters, Request, UnparseableMessage


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b" ",
        b"hello",
        b"null",
        b"[]",
        b'"text"',
        b"7",
        b"{}",
        b'{"request_id": null, "prompt": "x"}',
        b'{"request_id": 5}',
        b'{"request_id": "\\ud800"}',
        b'{"request_id": "r", "prompt": "x"',
        b'{"request_id": "r",}',
        b'\xef\xbb\xbf{"request_id": "r"}',
        b'{"request_id": "r", "prompt": "\xff"}',
        b'{"request_id": "r", "prompt": "\xed\xa0\x80"}',
        '{"request_id": "r", "prompt": "x"}'.encode("utf-16"),
        b'{"request_id": "' + b"r" * 5000 + b'"}',
    ],
)
def test_what_is_no_request_at_all(value: bytes | None) -> None:
    with pytest.raises(UnparseableMessage) as caught:
        Request.from_json(value)
    assert caught.value.reason
    assert caught.value.reason.isprintable()


MEGABYTES = 10_000_000
HEAD = b'{"request_id": "r", '


@pytest.mark.parametrize(
    "value",
    [
        b"[" * MEGABYTES,
        HEAD + b'"x": ' + b"[" * MEGABYTES,
        HEAD + b'"metadata": ' + b'{"a":' * (MEGABYTES // 5),
        HEAD + b'"metadata": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}",
        HEAD + b'"prompt": ' + b"[" * 900 + b"1e999" + b"]" * 900 + b"}",
        HEAD + b'"prompt_token_ids": [' + b'"",' * (MEGABYTES // 3) + b'""]}',
        HEAD + b'"messages": [' + b'{"role":"u","content":""},' * (MEGABYTES // 25) + b"1]}",
        HEAD + b'"prompt": "x", ' + b'"\\u0000a\\n": 1,' * (MEGABYTES // 14) + b'"y": 1}',
        HEAD + b'"prompt": ' + b"9" * MEGABYTES + b"}",
        HEAD + b'"prompt": [' + b"1e999," * (MEGABYTES // 6) + b"1]}",
        HEAD + b'"prompt": "x", "' + b"n" * MEGABYTES + b'": NaN}',
        HEAD + b'"prompt": "x", "metadata": {"a": "' + b"x" * MEGABYTES + b'"}}',
    ],
    ids=lambda value: value[:40].decode(),
)
def test_ten_hostile_megabytes_are_refused_in_time(value: bytes) -> None:
    started = time.process_time()
    with pytest.raises((InvalidRequest, UnparseableMessage)) as caught:
        Request.from_json(value)
    assert time.process_time() - started < 5
    assert len(str(caught.value)) < 1000


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("\ud800"),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.just("\udfff"), inner, max_size=3)
    ),
    max_leaves=8,
)
names = st.sampled_from([*Request.model_fields, "inputs", "x"])
parameter_names = st.sampled_from([*Parameters.model_fields, "max_tokens", "x"])
parameters = st.dictionaries(parameter_names, json_values | st.integers(0, 3) | st.just([]), max_size=4)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_are_a_request_or_one_of_two_errors(value: bytes) -> None:
    with pytest.raises((InvalidRequest, UnparseableMessage)):
        Request.from_json(value)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(names, json_values, max_size=5),
    parameters | st.none(),
    st.sampled_from([{}, {"request_id": "r"}, {"request_id": "r", "prompt": "x"}]),
    st.booleans(),
)
def test_any_object_is_answered_if_its_request_id_can_be_read(
    fields: dict[str, object], given_parameters: object, sure: dict[str, object], ascii_only: bool
) -> None:
    payload = {**fields, **({"parameters": given_parameters} if given_parameters is not None else {}), **sure}
    value = json.dumps(payload, ensure_ascii=ascii_only).encode(errors="surrogatepass")
    outcome = outcome_of(value)
    if isinstance(outcome, Request):
        assert Request.from_json(outcome.to_json()) == outcome
    elif isinstance(outcome, InvalidRequest):
        assert outcome.request_id == payload["request_id"]
        assert ": " in outcome.message
    else:
        assert not _is_utf8(value) or not _is_text(payload.get("request_id"))


def outcome_of(value: bytes) -> Request | InvalidRequest | UnparseableMessage:
    try:
        return Request.from_json(value)
    except (InvalidRequest, UnparseableMessage) as error:
        assert str(error).isprintable()  # noqa: PT017
        return error


def _is_utf8(value: bytes) -> bool:
    try:
        value.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_damaged_request_never_raises_anything_else(data: st.DataObject) -> None:
    request = Request(request_id="r", prompt="héllo", parameters={"stop": ["a"]}, metadata={"k": [1]})
    value = bytearray(request.to_json())
    for _ in range(data.draw(st.integers(1, 4))):
        value[data.draw(st.integers(0, len(value) - 1))] = data.draw(st.integers(0, 255))
    outcome_of(bytes(value))
