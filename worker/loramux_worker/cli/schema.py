"""`loramux schema`: the wire contract for machines."""

from __future__ import annotations

import sys
from enum import StrEnum
from typing import Annotated

import orjson
import typer

from loramux_schemas import asyncapi, json_schema


class Document(StrEnum):
    """Which description of the contract."""

    JSON_SCHEMA = "json-schema"
    ASYNCAPI = "asyncapi"
    BOTH = "both"


def schema(
    document: Annotated[Document, typer.Argument(help="Which document to print.")] = Document.BOTH,
) -> None:
    """Print the JSON Schema and the AsyncAPI 3 document of requests, replies, deltas and cancellations."""
    documents = {"json-schema": json_schema, "asyncapi": asyncapi}
    printed = (
        {name: build() for name, build in documents.items()} if document is Document.BOTH else documents[document]()
    )
    sys.stdout.buffer.write(orjson.dumps(printed, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))
