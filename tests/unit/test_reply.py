from __future__ import annotations

import json
import math

import pytest

from loramux_schemas import (
    ErrorCode,
    FinishReason,
    Reply,
    StreamDelta,
    Timing,
    TokenLogprob,
    TopLogprob,
    Usage,
)

FIELDS = [
    "request_id",
    "adapter_id",
    "revision",
    "status",
    "generated_text",
    "token_ids",
    "finish_reason",
    "usage",
    "logprobs",
    "timing",
    "worker",
    "metadata",
    "error",
]


def answered() -> Reply:
    return Reply(
        request_id="r",
        adapter_id="acme/support",
        revision="sha256:ab",
        generated_text="né😀",
        token_ids=(1, 2),
        finish_reason=FinishReason.EOS_TOKEN,
        usage=Usage(prompt_tokens=70, completion_tokens=2),
        logprobs=(TokenLogprob(id=1, text="n", logprob=-0.5, top=(TopLogprob(id=1, text="n", logprob=-0.5),)),),
        timing=Timing(total_ms=1.5),
        worker="w",
        metadata={"a": {"b": [1, None]}},
    )


def test_every_field_is_written() -> None:
    written = json.loads(answered().to_json())
    assert list(written) == FIELDS
    assert written["status"] == "ok"
    assert written["finish_reason"] == "eos_token"
    assert written["usage"] == {"prompt_tokens": 70, "completion_tokens": 2, "cached_tokens": 0}
    assert written["logprobs"] == [
        {"id": 1, "text": "n", "logprob": -0.5, "top": [{"id": 1, "text": "n", "logprob": -0.5}]}
    ]
    assert list(written["timing"]) == ["queue_ms", "adapter_ms", "prefill_ms", "decode_ms", "total_ms"]
    assert written["error"] is None
    assert Reply.from_json(answered().to_json()) == answered()


@pytest.mark.parametrize("code", list(ErrorCode))
def test_a_failure_has_every_field_and_says_whether_to_try_again(code: ErrorCode) -> None:
    reply = Reply.failure(code, "why", request_id="r", adapter_id="a", worker="w", metadata={"m": 1})
    written = json.loads(reply.to_json())
    assert list(written) == FIELDS
    retryable = code in ("adapter_unavailable", "internal")
    assert written["error"] == {"code": str(code), "message": "why", "retryable": retryable}
    assert (written["status"], written["generated_text"], written["token_ids"]) == ("error", None, None)
    assert (written["worker"], written["metadata"], written["adapter_id"]) == ("w", {"m": 1}, "a")
    assert Reply.from_json(reply.to_json()) == reply


def test_the_codes_are_those_of_the_contract() -> None:
    assert set(ErrorCode) == {
        "invalid_request",
        "forbidden",
        "adapter_not_found",
        "adapter_invalid",
        "adapter_unavailable",
        "context_length_exceeded",
        "deadline_exceeded",
        "cancelled",
        "internal",
    }


def test_an_unreadable_message_is_answered_without_a_request_id() -> None:
    reply = Reply.failure(ErrorCode.INVALID_REQUEST, "not JSON", request_id=None)
    assert json.loads(reply.to_json())["request_id"] is None


def test_a_newer_reply_can_be_read() -> None:
    written = json.loads(answered().to_json())
    written["new_field"] = 1
    written["usage"]["other"] = 2
    assert Reply.from_json(json.dumps(written).encode()) == answered()


@pytest.mark.parametrize("value", [b"", b"[]", b"{}", b"\xff", b'{"request_id": "r", "status": "maybe"}'])
def test_what_is_no_reply_is_a_value_error(value: bytes) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Reply.from_json(value)


def test_an_impossible_token_has_a_finite_logprob() -> None:
    entry = TopLogprob(id=0, text="", logprob=-math.inf)
    assert json.loads(entry.to_json())["logprob"] == -9999.0


def test_delta() -> None:
    delta = StreamDelta(request_id="r", index=0, text="😀", token_ids=(5, 6))
    assert json.loads(delta.to_json()) == {"request_id": "r", "index": 0, "text": "😀", "token_ids": [5, 6]}
    assert StreamDelta.from_json(delta.to_json()) == delta
