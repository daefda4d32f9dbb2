"""The contract as documents: JSON Schema for the values, AsyncAPI 3 for topics, keys and headers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from loramux_schemas import headers as names
from loramux_schemas import topics
from loramux_schemas.cancellation import Cancellation
from loramux_schemas.reply import Reply, StreamDelta
from loramux_schemas.request import ChatMessage, Parameters, Request

_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_INPUTS = ("prompt", "inputs", "messages", "prompt_token_ids")


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12): the four kinds of message under `$defs`, any of them as root."""
    return {
        "$schema": _DIALECT,
        "title": "loramux wire contract",
        "anyOf": [{"$ref": f"#/$defs/{model.__name__}"} for model in (Request, Reply, StreamDelta, Cancellation)],
        "$defs": _definitions("#/$defs/{model}"),
    }


def asyncapi() -> dict[str, Any]:
    """AsyncAPI 3.0.0 from the worker's side: it receives requests and cancellations, and sends the rest."""
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "loramux",
            "version": "1.0.0",
            "description": "One base model, many LoRA adapters: a request in, one reply out.",
            "license": {"name": "Apache-2.0"},
        },
        "defaultContentType": "application/json",
        "servers": {"kafka": {"host": "localhost:9092", "protocol": "kafka"}},
        "channels": {
            "requests": _channel(topics.REQUESTS_TOPIC, "request", "Requests; any client writes here."),
            "replies": _channel(topics.REPLIES_TOPIC, "reply", "One final reply for each request."),
            "stream": _channel(topics.STREAM_TOPIC, "delta", "Pieces of text of requests with `stream: true`."),
            "deadLetters": _channel(
                topics.DEAD_LETTERS_TOPIC,
                "deadLetter",
                "Messages that could not be read as requests, unchanged.",
            ),
            "control": _channel(topics.CONTROL_TOPIC, "cancellation", "Cancellations; every worker reads all of them."),
        },
        "operations": {
            "receiveRequest": {
                **_operation("receive", "requests", "request"),
                "reply": {
                    "channel": {"$ref": "#/channels/replies"},
                    "messages": [{"$ref": "#/channels/replies/messages/reply"}],
                },
            },
            "receiveCancellation": _operation("receive", "control", "cancellation"),
            "sendReply": _operation("send", "replies", "reply"),
            "sendDelta": _operation("send", "stream", "delta"),
            "sendDeadLetter": _operation("send", "deadLetters", "deadLetter"),
        },
        "components": {"messages": _messages(), "schemas": _definitions("#/components/schemas/{model}")},
    }


def _definitions(ref_template: str) -> dict[str, Any]:
    _, schema = models_json_schema(
        [
            (Request, "validation"),
            (Reply, "serialization"),
            (StreamDelta, "serialization"),
            (Cancellation, "validation"),
        ],
        ref_template=ref_template,
    )
    definitions: dict[str, Any] = schema["$defs"]
    for definition in definitions.values():  # what follows the first paragraph is for readers of the code
        definition["description"] = definition["description"].partition("\n\n")[0].replace("\n", " ")
    for model in (Request, Parameters, ChatMessage):
        _admit_absence_and_aliases(definitions[model.__name__], model.aliases)
    # Exactly one input, under either of its names; null is as good as absent.
    definitions[Request.__name__]["oneOf"] = [
        {"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in _INPUTS
    ]
    return definitions


def _admit_absence_and_aliases(definition: dict[str, Any], aliases: Mapping[str, str]) -> None:
    """What pydantic cannot know: null stands for an absent field, and a field may have a second name."""
    properties = definition["properties"]
    for name, field in properties.items():
        nullable = any(option == {"type": "null"} for option in field.get("anyOf", ()))
        if name not in definition.get("required", ()) and not nullable:
            outer = {key: field.pop(key) for key in ("default", "description", "title") if key in field}
            properties[name] = {"anyOf": [field, {"type": "null"}], **outer}
    for alias, name in aliases.items():
        properties[alias] = {**properties[name], "description": f"another name for {name}"}
        properties[alias].pop("default", None)
        both = {
            "required": [alias, name],
            "properties": {n: {"not": {"type": "null"}} for n in (alias, name)},
        }
        definition["not"] = both


def _channel(address: str, message: str, description: str) -> dict[str, Any]:
    return {
        "address": address,
        "description": description,
        "messages": {message: {"$ref": f"#/components/messages/{message}"}},
        "bindings": {"kafka": {"topic": address}},
    }


def _operation(action: str, channel: str, message: str) -> dict[str, Any]:
    return {
        "action": action,
        "channel": {"$ref": f"#/channels/{channel}"},
        "messages": [{"$ref": f"#/channels/{channel}/messages/{message}"}],
    }


def _messages() -> dict[str, Any]:
    echoed = {
        names.CORRELATION_ID: "Echoed byte for byte.",
        names.SPRING_CORRELATION_ID: "Spring's correlation id; echoed byte for byte.",
        names.TRACEPARENT: "W3C trace context.",
    }
    routing = {
        names.REPLY_TO: "A reply topic; must be allowed by the worker.",
        names.SPRING_REPLY_TOPIC: "Spring's reply topic; must be allowed by the worker.",
        names.SPRING_REPLY_PARTITION: "Spring's reply partition: int32, big-endian.",
    }
    asking = {
        **echoed,
        **routing,
        names.TENANT: "On whose behalf, where workers have an --authorization-file; "
        "the header's name is their --tenant-header.",
    }
    origin = {
        names.DEAD_LETTER_TOPIC: "The topic that the message came from.",
        names.DEAD_LETTER_PARTITION: "Its partition: int32, big-endian.",
        names.DEAD_LETTER_OFFSET: "Its offset: int64, big-endian.",
        names.DEAD_LETTER_MESSAGE: "Why it is no request, or that engines died of it.",
    }
    adapter_key = "The adapter_id; empty for the base model."
    request_key = "The request_id; none where it could not be read."
    dead_letter = _message("Dead letter", None, "The key of the original message.", {**asking, **origin})
    return {
        "request": _message("Request", Request, adapter_key, asking),
        "reply": _message("Reply", Reply, request_key, echoed),
        "delta": _message("Stream delta", StreamDelta, "The request_id.", echoed),
        "cancellation": _message("Cancellation", Cancellation, "The request_id.", {}),
        "deadLetter": dead_letter | {"contentType": "application/octet-stream"},
    }


def _message(title: str, model: type[BaseModel] | None, key: str, headers: dict[str, str]) -> dict[str, Any]:
    properties = {name: {"type": "string", "description": text} for name, text in headers.items()}
    message: dict[str, Any] = {
        "title": title,
        "headers": {"type": "object", "properties": properties},
        "bindings": {"kafka": {"key": {"type": "string", "description": key}, "bindingVersion": "0.5.0"}},
    }
    if model is not None:
        message["payload"] = {"$ref": f"#/components/schemas/{model.__name__}"}
    return message
