"""Logs: one line an event on stderr, for people or (`json`) for machines.

Prompts, completions and secrets are never logged: a traceback shows lines of code and no values of variables, and other
libraries are heard from `warning` on. What is bound with `structlog.contextvars` (request_id,
adapter_id) is on every line that is written on behalf of that request.
"""

from __future__ import annotations

import logging
import sys

import orjson
import structlog
from structlog.tracebacks import ExceptionDictTransformer

# Of all others only warnings: at level debug HTTP libraries write whole requests, with the headers and signed URLs that
# open doors, and new ones come with every new version of something.
OWN = ("loramux_worker", "loramux_schemas", "loramux_producer", "loramux_kernels", "__main__")


def configure_logs(log_format: str = "text", level: str = "info") -> None:
    """Send structlog's and the standard library's events to stderr in one format.

    Args:
        log_format: `text` or `json`.
        level: debug, info, warning or error.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    if log_format == "json":
        shared.append(structlog.processors.ExceptionRenderer(ExceptionDictTransformer(show_locals=False)))
        renderer: structlog.typing.Processor = structlog.processors.JSONRenderer(_dumps)
    else:
        renderer = structlog.dev.ConsoleRenderer(
            colors=sys.stderr.isatty(), exception_formatter=structlog.dev.plain_traceback
        )
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    own_level = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(handlers=[handler], level=max(logging.WARNING, own_level), force=True)
    for name in OWN:
        logging.getLogger(name).setLevel(own_level)
    # its errors about brokers that are away come several a second; ours say it once, with what we do about it
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)


def _dumps(event: object, **_: object) -> str:
    return orjson.dumps(event, default=str).decode()
