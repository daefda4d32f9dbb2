"""Options of every Kafka client of the harness: brokers that are down are no news here."""

from __future__ import annotations

import logging
from typing import Any


def quiet_options(servers: str) -> dict[str, Any]:
    """Reach the brokers, reconnect soon, complain to nobody."""
    logger = logging.getLogger("chaos.kafka")
    logger.setLevel(logging.CRITICAL)
    return {
        "bootstrap.servers": servers,
        "reconnect.backoff.ms": 50,
        "reconnect.backoff.max.ms": 500,
        "log_level": 0,
        "logger": logger,
    }
