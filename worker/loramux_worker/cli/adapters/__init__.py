"""`loramux adapters`: what a person does with adapters without a worker. One file a command here."""

from __future__ import annotations

import typer

from loramux_worker.cli.adapters.check import check
from loramux_worker.cli.adapters.list import list_command
from loramux_worker.cli.adapters.merge import merge
from loramux_worker.cli.adapters.pull import pull

adapters = typer.Typer(
    name="adapters",
    help="Check, list, fetch and merge adapters, without a worker and without a GPU.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
adapters.command()(check)
adapters.command("list")(list_command)
adapters.command()(pull)
adapters.command()(merge)
