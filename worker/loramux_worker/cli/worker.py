"""`loramux worker`: serve."""

from __future__ import annotations

import typer


def worker(context: typer.Context) -> None:
    """Serve a base model and its adapters from Kafka; `loramux worker --help` lists every setting."""
    from loramux_worker.settings_sources import load_settings

    settings = load_settings(context.args)  # before torch: a wrong flag is told at once

    from loramux_worker.serving import serve

    serve(settings)
