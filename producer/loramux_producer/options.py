"""What the commands take: how to reach Kafka, in Kafka's own words or from the environment, and a request's parts."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from typing import Annotated, Any, Final

import orjson
import typer

from loramux_producer.connection import kafka_connection
from loramux_producer.terminal import exits
from loramux_schemas import KafkaConnection

PANEL: Final = "Kafka"
ROLES: Final = ("system", "user", "assistant", "tool")

RequestsTopic = Annotated[str, typer.Option("--requests-topic", envvar="LORAMUX_REQUESTS_TOPIC", rich_help_panel=PANEL)]
RepliesTopic = Annotated[str, typer.Option("--replies-topic", envvar="LORAMUX_REPLIES_TOPIC", rich_help_panel=PANEL)]
ControlTopic = Annotated[str, typer.Option("--control-topic", envvar="LORAMUX_CONTROL_TOPIC", rich_help_panel=PANEL)]
StreamTopic = Annotated[str, typer.Option("--stream-topic", envvar="LORAMUX_STREAM_TOPIC", rich_help_panel=PANEL)]
Header = Annotated[
    list[str] | None,
    typer.Option("--header", "-H", metavar="KEY=VALUE", help="A Kafka header of the requests, as tenant=acme. Repeat."),
]


def record_headers(arguments: list[str]) -> list[tuple[str, bytes]]:
    """`key=value` arguments as headers of a record. Raises `ValueError`."""
    pairs = [argument.partition("=") for argument in arguments]
    for argument, (name, equals, _) in zip(arguments, pairs, strict=True):
        if not (name and equals):
            raise ValueError(f"--header {argument}: expected key=value")
    return [(name, value.encode()) for name, _, value in pairs]


def with_connection(command: Callable[..., None]) -> Callable[..., None]:
    """The command with an option for each setting of KafkaConnection in place of its parameter `connection`."""

    @functools.wraps(command)
    def run(**arguments: Any) -> None:
        with exits():
            connection = kafka_connection(**{name: arguments.pop(name) for name in KafkaConnection.settings()})
            command(connection=connection, **arguments)

    parameters = dict(inspect.signature(command, eval_str=True).parameters)
    del parameters["connection"]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=_option(name))
        for name, field in KafkaConnection.settings().items()
    ]
    own = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters.values()]
    run.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined] # typer reads it
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in (*own, *options)}
    return run


def _option(name: str) -> Any:
    field = KafkaConnection.model_fields[name]
    help_text = field.description or ""
    option = typer.Option(
        f"--{name.replace('_', '-')}",
        envvar=f"LORAMUX_{name.upper()}",
        help=f"{help_text[:1].upper()}{help_text[1:]}.",
        rich_help_panel=PANEL,
    )
    return Annotated[str if field.default is not None else str | None, option]


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
