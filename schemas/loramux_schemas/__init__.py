"""The wire contract of loramux: requests, replies, deltas, cancellations, headers, topics, error codes.

from loramux_schemas import Request, Reply

value = Request(request_id="…", adapter_id="acme/support", prompt="Hello").to_json()
"""

from loramux_schemas.adapter_names import AdapterName
from loramux_schemas.cancellation import Cancellation
from loramux_schemas.connection import KafkaConnection
from loramux_schemas.documents import asyncapi, json_schema
from loramux_schemas.errors import ErrorCode, InvalidRequest, SchemaError, UnparseableMessage, describe
from loramux_schemas.headers import Headers, ReplyRoute, dead_letter_headers
from loramux_schemas.reply import (
    FinishReason,
    Reply,
    ReplyError,
    StreamDelta,
    Timing,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from loramux_schemas.request import ChatMessage, Parameters, Request
from loramux_schemas.topics import (
    CONTROL_TOPIC,
    DEAD_LETTERS_TOPIC,
    REPLIES_TOPIC,
    REQUESTS_TOPIC,
    STREAM_TOPIC,
)

__all__ = [
    "CONTROL_TOPIC",
    "DEAD_LETTERS_TOPIC",
    "REPLIES_TOPIC",
    "REQUESTS_TOPIC",
    "STREAM_TOPIC",
    "AdapterName",
    "Cancellation",
    "ChatMessage",
    "ErrorCode",
    "FinishReason",
    "Headers",
    "InvalidRequest",
    "KafkaConnection",
    "Parameters",
    "Reply",
    "ReplyError",
    "ReplyRoute",
    "Request",
    "SchemaError",
    "StreamDelta",
    "Timing",
    "TokenLogprob",
    "TopLogprob",
    "UnparseableMessage",
    "Usage",
    "asyncapi",
    "dead_letter_headers",
    "describe",
    "json_schema",
]
