"""Errors of the worker.

LoramuxError
├── ConfigurationError   a person can mend it: one line, exit code 2
└── RequestFailed        one request is answered with an error reply; nobody else notices
    └── Poisonous        … and kept as a dead letter too: it took down the engines that worked on it
"""

from __future__ import annotations

from loramux_schemas import ErrorCode


class LoramuxError(Exception):
    """Base of every error that the worker raises on purpose."""


class ConfigurationError(LoramuxError):
    """A setting, file or server that a person must change; the message names it and says what to do."""


class RequestFailed(LoramuxError):
    """One request cannot be answered with text: `code` and the message go into its error reply."""

    def __init__(self, code: ErrorCode, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class Poisonous(RequestFailed):
    """Engines died of one request: it is given up, answered, and kept as a dead letter for a person to look at."""

    def __init__(self, message: str) -> None:
        super().__init__(ErrorCode.INTERNAL, message)
