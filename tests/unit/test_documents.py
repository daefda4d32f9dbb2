from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from loramux_schemas import (
    Cancellation,
    ErrorCode,
    FinishReason,
    InvalidRequest,
    Reply,
    Request,
    StreamDelta,
    TokenLogprob,
    UnparseableMessage,
    Usage,
    asyncapi,
    json_schema,
)


@cache
def validator(name: str) -> Draft202012Validator:
    schema = json_schema()
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator({"$ref": f"#/$defs/{name}", "$defs": schema["$defs"]})


GOOD_REQUESTS: list[dict[str, Any]] = [
    {"request_id": "r", "prompt": "x"},
    {"request_id": "r", "inputs": "x", "parameters": {"max_tokens": 3, "seed": None}},
    {"request_id": "r", "prompt": "x", "inputs": None, "messages": None},
    {"request_id": "r", "prompt": "x", "adapter_id": None, "parameters": None, "stream": None},
    {"request_id": "r", "messages": [{"role": "user", "content": "x"}], "adapter_id": "a/b@r"},
    {"request_id": "r", "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]},
    {"request_id": "r", "prompt_token_ids": [1, 2], "metadata": {"a": [1]}, "priority": -3},
    {
        "request_id": "r",
        "prompt": "x",
        "parameters": {"stop": ["a"], "logprobs": 5, "temperature": 0, "top_p": 0.5, "do_sample": True},
    },
]
BAD_REQUESTS: list[dict[str, Any]] = [
    {"prompt": "x"},
    {"request_id": "r"},
    {"request_id": "r", "prompt": None},
    {"request_id": 5, "prompt": "x"},
    {"request_id": "r", "prompt": "x", "inputs": "x"},
    {"request_id": "r", "prompt": "x", "messages": [{"role": "user", "content": "x"}]},
    {"request_id": "r", "messages": []},
    {"request_id": "r", "prompt_token_ids": []},
    {"request_id": "r", "prompt_token_ids": [-1]},
    {"request_id": "r", "prompt": "x", "unknown": 1},
    {"request_id": "r", "prompt": "x", "parameters": {"unknown": 1}},
    {"request_id": "r", "prompt": "x", "parameters": {"max_tokens": 3, "max_new_tokens": 3}},
    {"request_id": "r", "prompt": "x", "parameters": {"top_p": 0}},
    {"request_id": "r", "prompt": "x", "parameters": {"stop": "a"}},
    {"request_id": "r", "messages": [{"role": "user", "content": [{"type": "image"}]}]},
]
BAD_CANCELLATIONS: list[dict[str, Any]] = [
    {"type": "cancel"},
    {"request_id": "r"},
    {"type": "stop", "request_id": "r"},
    {"type": "cancel", "request_id": ""},
    {"type": "cancel", "request_id": "r" * 257},
    {"type": "cancel", "request_id": 5},
    {"type": "cancel", "request_id": "r", "reason": "x"},
]


@pytest.mark.parametrize("payload", GOOD_REQUESTS)
def test_the_schema_takes_what_the_worker_takes(payload: dict[str, Any]) -> None:
    validator("Request").validate(payload)
    request = Request.from_json(json.dumps(payload).encode())
    validator("Request").validate(json.loads(request.to_json()))


@pytest.mark.parametrize("payload", BAD_REQUESTS)
def test_the_schema_refuses_what_the_worker_refuses(payload: dict[str, Any]) -> None:
    assert not validator("Request").is_valid(payload)
    if isinstance(payload.get("request_id"), str):
        with pytest.raises(InvalidRequest):
            Request.from_json(json.dumps(payload).encode())


def test_replies_and_deltas_follow_the_schema() -> None:
    ok = Reply(
        request_id="r",
        generated_text="x",
        token_ids=(1,),
        finish_reason=FinishReason.LENGTH,
        usage=Usage(prompt_tokens=1, completion_tokens=1),
        logprobs=(TokenLogprob(id=1, text="x", logprob=-1.0),),
    )
    failed = Reply.failure(ErrorCode.INTERNAL, "why", request_id=None)
    for reply in (ok, failed):
        validator("Reply").validate(json.loads(reply.to_json()))
    for field in Reply.model_fields:
        payload = json.loads(ok.to_json())
        del payload[field]
        assert not validator("Reply").is_valid(payload), f"{field} is always present"
    delta = StreamDelta(request_id="r", index=0, text="x", token_ids=(1,))
    validator("StreamDelta").validate(json.loads(delta.to_json()))
    Draft202012Validator(json_schema()).validate(json.loads(delta.to_json()))


def test_cancellations_follow_the_schema() -> None:
    validator("Cancellation").validate(json.loads(Cancellation.of("r").to_json()))
    for payload in BAD_CANCELLATIONS:
        assert not validator("Cancellation").is_valid(payload)
        with pytest.raises(UnparseableMessage):
            Cancellation.from_json(json.dumps(payload).encode())


def test_documents_are_json_and_every_reference_leads_somewhere() -> None:
    for document in (json_schema(), asyncapi()):
        assert json.loads(json.dumps(document)) == document
        for reference in references(document):
            node: Any = document
            for part in reference.removeprefix("#/").split("/"):
                node = node[part]


def references(node: object) -> list[str]:
    if isinstance(node, dict):
        own = [node["$ref"]] if isinstance(node.get("$ref"), str) else []
        return own + [reference for child in node.values() for reference in references(child)]
    if isinstance(node, list):
        return [reference for child in node for reference in references(child)]
    return []


def test_asyncapi_tells_topics_keys_headers_and_payloads() -> None:
    document = asyncapi()
    assert document["asyncapi"] == "3.0.0"
    addresses = {channel["address"] for channel in document["channels"].values()}
    assert addresses == {"lora.requests", "lora.replies", "lora.stream", "lora.dead-letters", "lora.control"}
    actions = {operation["channel"]["$ref"]: operation["action"] for operation in document["operations"].values()}
    assert actions == {
        "#/channels/requests": "receive",
        "#/channels/control": "receive",
        "#/channels/replies": "send",
        "#/channels/stream": "send",
        "#/channels/deadLetters": "send",
    }
    messages = document["components"]["messages"]
    assert "kafka_replyPartition" in messages["request"]["headers"]["properties"]
    assert "kafka_dlt-original-offset" in messages["deadLetter"]["headers"]["properties"]
    cancellation = messages.pop("cancellation")
    assert cancellation["payload"] == {"$ref": "#/components/schemas/Cancellation"}
    assert cancellation["bindings"]["kafka"]["key"]["description"] == "The request_id."
    assert all("correlation_id" in message["headers"]["properties"] for message in messages.values())
    assert all("key" in message["bindings"]["kafka"] for message in messages.values())
    schema = {"$ref": "#/components/schemas/Request", "components": document["components"]}
    assert Draft202012Validator(schema).is_valid(GOOD_REQUESTS[0])
    assert not Draft202012Validator(schema).is_valid(BAD_REQUESTS[0])
