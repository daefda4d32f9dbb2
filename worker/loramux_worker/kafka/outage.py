"""One log line when a broker goes away, one now and then while it stays away, one when it is back."""

from __future__ import annotations

import textwrap
import time
from typing import Final

import structlog

REPEAT_SECONDS: Final = 30.0
MAX_REASON_CHARACTERS: Final = 300

log = structlog.get_logger(__name__)


class Outage:
    """What one part of the worker cannot do at the moment, and since when."""

    def __init__(self, part: str) -> None:
        self._part = part
        self._since: float | None = None
        self._logged = 0.0

    @property
    def active(self) -> bool:
        """Whether the last attempt failed."""
        return self._since is not None

    def failed(self, doing: str, error: BaseException | str) -> None:
        """An attempt failed and will be repeated; says so once in REPEAT_SECONDS."""
        now = time.monotonic()
        if self._since is None:
            self._since, self._logged = now, float("-inf")
        if now - self._logged >= REPEAT_SECONDS:
            self._logged = now
            reason = error if isinstance(error, str) else explain(error)
            log.warning(
                "kafka_unavailable",
                part=self._part,
                doing=doing,
                reason=reason,
                seconds=round(now - self._since, 1),
            )

    def over(self) -> None:
        """An attempt succeeded."""
        if self._since is not None:
            log.info("kafka_back", part=self._part, seconds=round(time.monotonic() - self._since, 1))
            self._since = None


def explain(error: BaseException) -> str:
    """An error in one short line; a timeout has no text of its own."""
    name, text = type(error).__name__, textwrap.shorten(str(error), MAX_REASON_CHARACTERS, placeholder=" …")
    return text if text.startswith(name) else f"{name}: {text}" if text else name
