"""Logs: one line an event on stderr, for people or (`json`) for machines.

What is bound with `structlog.contextvars` (request_id, adapter_id, revision, partition, offset) is on every line that
is written on behalf of that request. Prompts and answers are not logged unless `--log-text` asks for it; tracebacks
come without the values of variables, which would hold them. Credentials that the process has from its environment or
its settings are blotted out, whoever writes them: an error of a library may quote an address with its password.
Of other libraries only warnings are heard.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterable

import orjson
import structlog
from structlog.tracebacks import ExceptionDictTransformer

# Of all others only warnings: at level debug HTTP libraries write whole requests, with the headers and signed URLs that
# open doors, and new ones come with every new version of something.
OWN = ("loramux_worker", "loramux_schemas", "loramux_producer", "loramux_kernels", "__main__")

_SECRET_NAMES = re.compile(
    r"(^|_)(PASSWORD|SECRET|TOKEN|CREDENTIALS|ACCOUNT_KEY|API_KEY|OTLP_HEADERS)(_|$)", re.IGNORECASE
)
_SHORTEST_SECRET = 6  # shorter ones are words of every other line
_BLOT = "***"


def configure_logs(log_format: str = "text", level: str = "info", secrets: Iterable[str] = ()) -> None:
    """Send structlog's and the standard library's events to stderr in one format.

    Args:
        log_format: `text` or `json`.
        level: debug, info, warning or error.
        secrets: what must not appear, beside what variables of the environment hold whose names say so.
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
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, Blotter(renderer, secrets)],
        )
    )
    own_level = logging.getLevelNamesMapping()[level.upper()]
    logging.basicConfig(handlers=[handler], level=max(logging.WARNING, own_level), force=True)
    for name in OWN:
        logging.getLogger(name).setLevel(own_level)
    # its errors about brokers that are away come several a second; ours say it once, with what we do about it
    logging.getLogger("aiokafka").setLevel(logging.CRITICAL)


class Blotter:
    """Takes credentials out of the lines that a renderer writes, as they are and as JSON writes them."""

    def __init__(self, renderer: structlog.typing.Processor, secrets: Iterable[str]) -> None:
        self._renderer = renderer
        named = (value for name, value in os.environ.items() if _SECRET_NAMES.search(name))
        long_enough = {secret for secret in (*secrets, *named) if len(secret) >= _SHORTEST_SECRET}
        written = long_enough | {orjson.dumps(secret).decode()[1:-1] for secret in long_enough}
        longest_first = sorted(written, key=len, reverse=True)
        self._secret = re.compile("|".join(map(re.escape, longest_first))) if written else None

    def __call__(self, logger: object, method: str, event: structlog.typing.EventDict) -> str:
        """The event's line without them."""
        line = str(self._renderer(logger, method, event))
        return line if self._secret is None else self._secret.sub(_BLOT, line)


def _dumps(event: object, **_: object) -> str:
    return orjson.dumps(event, default=str).decode()
