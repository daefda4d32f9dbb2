"""Default topic names, and what a topic may be called."""

from __future__ import annotations

import re
from typing import Final

REQUESTS_TOPIC: Final = "lora.requests"
REPLIES_TOPIC: Final = "lora.replies"
STREAM_TOPIC: Final = "lora.stream"
DEAD_LETTERS_TOPIC: Final = "lora.dead-letters"
CONTROL_TOPIC: Final = "lora.control"

_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")


def is_topic_name(text: str) -> bool:
    """Whether Kafka would take `text` as a topic's name."""
    return _TOPIC.fullmatch(text) is not None and text not in (".", "..")
