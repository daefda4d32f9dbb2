"""`loramux adapters list`: what a store holds."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Annotated

import typer

from loramux_worker.cli.adapters.options import quiet_logs
from loramux_worker.cli.adapters.terminal import size_text

if TYPE_CHECKING:
    from loramux_worker.adapters.listing import ListedAdapter


def list_command(
    template: Annotated[
        str, typer.Argument(metavar="URI_TEMPLATE", help="As --adapter-uri, e.g. s3://bucket/adapters/{adapter_id}")
    ],
    limit: Annotated[int | None, typer.Option(min=1, help="Stop after so many.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that the store may take to answer.")] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """List the adapters that a store holds: size of both files, last change, id; one a line, as they are found.

    An adapter is a folder with adapter_config.json and
    adapter_model.safetensors, under a name that a request can use.
    Whether a worker would serve it, `loramux adapters check` says.

    Example: loramux adapters list 's3://bucket/adapters/{adapter_id}'
    """
    quiet_logs()
    asyncio.run(_list(template, limit, timeout, as_json))


async def _list(template: str, limit: int | None, timeout: float, as_json: bool) -> None:
    from loramux_worker.adapters.listing import list_adapters

    count = size = 0
    async with aclosing(list_adapters(template, timeout=timeout)) as found:
        async for adapter in found:
            typer.echo(_json_line(adapter) if as_json else _line(adapter))
            count, size = count + 1, size + adapter.size
            if count == limit:
                break
    if not as_json:
        what = "1 adapter" if count == 1 else f"{count} adapters"
        stopped = ", stopped there by --limit" if count == limit else ""
        typer.echo(f"{what}, {size_text(size)}{stopped}", err=True)


def _line(adapter: ListedAdapter) -> str:
    return f"{size_text(adapter.size):>10}  {adapter.last_modified:%Y-%m-%d %H:%M:%SZ}  {adapter.adapter_id}"


def _json_line(adapter: ListedAdapter) -> bytes:
    import orjson

    fields = {"adapter": adapter.adapter_id, "bytes": adapter.size, "last_modified": adapter.last_modified}
    return orjson.dumps(fields)
