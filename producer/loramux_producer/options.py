"""What the commands take: how to reach Kafka, in Kafka's own words or from the environment, and a request's parts."""

from __future__ import annotations

import sys
from typing import Annotated, Any, Final

import orjson
import typer

PANEL: Final = "Kafka"
ROLES: Final = ("system", "user", "assistant", "tool")

BootstrapServers = Annotated[
    str,
    typer.Option(
        "--bootstrap-servers", envvar="LORAMUX_BOOTSTRAP_SERVERS", help="host:port, comma-separated.",
        rich_help_panel=PANEL,
    ),
]  # fmt: skip
SecurityProtocol = Annotated[
    str,
    typer.Option(
        "--security-protocol", envvar="LORAMUX_SECURITY_PROTOCOL",
        help="PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL.", rich_help_panel=PANEL,
    ),
]  # fmt: skip
SaslMechanism = Annotated[
    str,
    typer.Option(
        "--sasl-mechanism", envvar="LORAMUX_SASL_MECHANISM",
        help="PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512.", rich_help_panel=PANEL,
    ),
]  # fmt: skip
SaslUsername = Annotated[
    str | None, typer.Option("--sasl-username", envvar="LORAMUX_SASL_USERNAME", rich_help_panel=PANEL)
]
SaslPassword = Annotated[
    str | None,
    typer.Option(
        "--sasl-password",
        envvar="LORAMUX_SASL_PASSWORD",
        help="Better from the environment.",
        rich_help_panel=PANEL,
    ),
]
SslCafile = Annotated[
    str | None,
    typer.Option(
        "--ssl-cafile",
        envvar="LORAMUX_SSL_CAFILE",
        help="PEM file with the authorities.",
        rich_help_panel=PANEL,
    ),
]
SslCertfile = Annotated[
    str | None,
    typer.Option(
        "--ssl-certfile", envvar="LORAMUX_SSL_CERTFILE", help="PEM file with the client's certificate.",
        rich_help_panel=PANEL,
    ),
]  # fmt: skip
SslKeyfile = Annotated[
    str | None,
    typer.Option(
        "--ssl-keyfile",
        envvar="LORAMUX_SSL_KEYFILE",
        help="PEM file with the client's key.",
        rich_help_panel=PANEL,
    ),
]
RequestsTopic = Annotated[str, typer.Option("--requests-topic", envvar="LORAMUX_REQUESTS_TOPIC", rich_help_panel=PANEL)]
RepliesTopic = Annotated[str, typer.Option("--replies-topic", envvar="LORAMUX_REPLIES_TOPIC", rich_help_panel=PANEL)]
ControlTopic = Annotated[str, typer.Option("--control-topic", envvar="LORAMUX_CONTROL_TOPIC", rich_help_panel=PANEL)]
StreamTopic = Annotated[str, typer.Option("--stream-topic", envvar="LORAMUX_STREAM_TOPIC", rich_help_panel=PANEL)]


def chat_messages(arguments: list[str]) -> list[dict[str, str]] | None:
    """`user: Hi` as a chat message; text without a role of the usual four in front is the user's."""
    messages = []
    for argument in arguments:
        role, colon, content = argument.partition(":")
        if colon and role in ROLES:
            messages.append({"role": role, "content": content.removeprefix(" ")})
        else:
            messages.append({"role": "user", "content": argument})
    return messages or None


def other_fields(arguments: list[str]) -> dict[str, Any]:
    """`key=value` arguments as fields of a request: values that are JSON are taken as that, others as text."""
    fields: dict[str, Any] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not equals:
            raise ValueError(f"--parameter {argument}: expected key=value")
        if name == "prompt":
            raise ValueError("--parameter prompt: give it as an argument or with --prompt")
        try:
            fields[name] = orjson.loads(value)
        except orjson.JSONDecodeError:
            fields[name] = value
    return fields


def prompt_from_stdin() -> str:
    """What is piped in, without the last line's end; raises `ValueError` if nothing is."""
    if sys.stdin.isatty():
        raise ValueError("no prompt: give one as an argument, with --message, or on stdin")
    try:
        text = sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt on stdin is not UTF-8: {error.reason} at byte {error.start}") from None
    if not text:
        raise ValueError("no prompt: stdin is empty")
    return text.removesuffix("\n")
