"""Logs: one line an event on stderr, for people or (`json`) for machines.

Prompts and completions are never logged. What is bound with `structlog.contextvars` (request_id, adapter_id) is on
every line that is written on behalf of that request.
"""

from __future__ import annotations

import logging
import sys

import orjson
import structlog


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
        shared.append(structlog.processors.dict_tracebacks)
        renderer: structlog.typing.Processor = structlog.processors.JSONRenderer(_dumps)
    else:
        renderer = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())
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
    logging.basicConfig(handlers=[handler], level=level.upper(), force=True)
    for chatty in ("aiokafka", "transformers", "asyncio", "httpx"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))
    # its errors about brokers that are away come several a second; ours say it once, with what we do about it
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)


def _dumps(event: object, **_: object) -> str:
    return orjson.dumps(event, default=str).decode()
