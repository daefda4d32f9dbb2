"""The options that the commands of `loramux adapters` share, and the worker's settings behind them.

What is not given comes from where the worker takes it: `LORAMUX_*` in the environment, or the TOML file of `--config`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from loramux_worker.errors import ConfigurationError

if TYPE_CHECKING:
    from loramux_worker.settings import WorkerSettings

Model = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="The base model: a folder in Hugging Face format (or LORAMUX_MODEL)."),
]
ModelName = Annotated[
    str | None,
    typer.Option(help="What adapters call the base model, e.g. meta-llama/Llama-3.1-8B: those of another are refused."),
]
AdapterUri = Annotated[
    str | None,
    typer.Option(
        metavar="TEMPLATE",
        help="Where ids lead, e.g. s3://bucket/adapters/{adapter_id} (or LORAMUX_ADAPTER_URI). Without it an adapter "
        "is the path of a folder; with it a path begins with / or ./ or ../ or ~",
    ),
]
Timeout = Annotated[float, typer.Option(min=0.1, help="Seconds that one adapter may take to arrive.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", help="The worker's TOML file, or LORAMUX_CONFIG.")]


def worker_settings(**given: object) -> WorkerSettings:
    """The settings that a worker would have with these flags, those that are None left out.

    Raises ConfigurationError.
    """
    from loramux_worker.settings_sources import load_settings

    return load_settings([f"--{name.replace('_', '-')}={value}" for name, value in given.items() if value is not None])


def required_uri(settings: WorkerSettings) -> str:
    """`--adapter-uri` of a command that cannot do without. Raises ConfigurationError."""
    if settings.adapter_uri is None:
        raise ConfigurationError("--adapter-uri is required (or LORAMUX_ADAPTER_URI)")
    return settings.adapter_uri


def quiet_logs() -> None:
    """Leave the terminal to the command: what goes wrong is told in its own line."""
    import logging

    import structlog

    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
