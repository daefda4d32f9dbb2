"""The command `loramux`: one file a command here, `adapters` a folder of them; `send`, `batch`, `cancel`: the client's.

Nothing is imported before the command that needs it runs, so that the client's commands work without torch and
`--help` is quick. Every error that a person can cause is one line on stderr and exit code 2.
"""

from __future__ import annotations

import sys

import typer

from loramux_producer.commands import batch, cancel, send
from loramux_worker.cli.adapters import adapters
from loramux_worker.cli.broker import broker
from loramux_worker.cli.demo import demo
from loramux_worker.cli.plan import plan
from loramux_worker.cli.schema import schema
from loramux_worker.cli.top import top
from loramux_worker.cli.worker import worker
from loramux_worker.errors import ConfigurationError

app = typer.Typer(
    name="loramux",
    help="Serve thousands of LoRA fine-tunes of one base model, fed from Kafka.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],  # the settings print their own help
    }
)(worker)
for command in (demo, send, batch, cancel, top, plan, schema, broker):
    app.command()(command)
app.add_typer(adapters)


_EXTRAS = {
    "confluent_kafka": "embedded",
    "matplotlib": "plan",
    "numpy": "plan",
    "opentelemetry": "tracing",
    "textual": "top",
}


def main() -> None:
    """Run the command line."""
    try:
        app()
    except ConfigurationError as error:
        print(f"loramux: {error}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as error:
        extra = _EXTRAS.get((error.name or "").partition(".")[0], "worker")
        print(f"loramux: {error.name} is missing: pip install 'loramux[{extra}]'", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
