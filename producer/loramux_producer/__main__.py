"""`python -m loramux_producer send|batch|cancel`: the commands of the client without those of the worker."""

from __future__ import annotations

import typer

from loramux_producer.commands import batch, cancel, send


def main() -> None:
    """Run a command and exit with its code."""
    app = typer.Typer(no_args_is_help=True, add_completion=False, help="Ask loramux through Kafka.")
    app.command()(send)
    app.command()(batch)
    app.command()(cancel)
    app()


if __name__ == "__main__":
    main()
