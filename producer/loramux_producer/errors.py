"""Errors of the client.

    ClientError               no broker, no topic, a broker that refuses: the message says which
    ├── ReplyFailed           the worker answered with an error reply: `.reply`, `.code`, `.retryable`
    ├── ReplyTimeout          nothing came in time; what comes later is ignored
    ├── RequestTooLarge       Kafka does not take a record of this size
    └── ClientClosed          the client was closed, before or while the request waited

A request that breaks the contract never leaves the client: it is a `ValueError` that names the field.
"""

from __future__ import annotations

from loramux_schemas import ErrorCode, Reply


class ClientError(Exception):
    """Base of every error that the client raises on purpose; the message is one line."""


class ReplyFailed(ClientError):
    """The reply is an error reply."""

    def __init__(self, reply: Reply) -> None:
        assert reply.error is not None
        super().__init__(f"{reply.error.code}: {reply.error.message}")
        self.reply = reply

    @property
    def code(self) -> ErrorCode:
        """Why there is no text."""
        assert self.reply.error is not None
        return self.reply.error.code

    @property
    def retryable(self) -> bool:
        """Whether the same request may succeed when it is sent again."""
        assert self.reply.error is not None
        return self.reply.error.retryable


class ReplyTimeout(ClientError):
    """No final reply came within the request's timeout."""


class RequestTooLarge(ClientError):
    """The broker, or the producer on its behalf, refuses a record of this size."""


class ClientClosed(ClientError):
    """The client is closed."""


class BatchError(Exception):
    """A batch that cannot begin or did not end; the message says what to do.

    InputError and JournalError are mended by a person; Unanswered by running the batch again.
    """


class InputError(BatchError):
    """Lines of the input are no requests; the message has one line for each, with its number."""


class JournalError(BatchError):
    """The journal of an earlier run cannot be used."""


class Unanswered(BatchError):
    """Requests have had no reply in time."""
