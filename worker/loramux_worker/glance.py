"""What a record says of itself, read before it is parsed: whose it is, and what could end its waiting early."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgspec

from loramux_worker.kafka.records import Record

UNREADABLE: Final = ""  # stands for the adapter of what is no request; no adapter is called so
OVERHEAD: Final = 1024  # bytes that a record takes in memory beside its value


class _Fields(msgspec.Struct):
    # The decoder skips every other field without making anything of it: some 1 µs, and 1 ms for a value of 1 MB.
    request_id: str | None = None
    adapter_id: str | None = None
    priority: int | None = None
    deadline_ms: int | None = None


_DECODER: Final = msgspec.json.Decoder(_Fields)


@dataclass(frozen=True, slots=True, eq=False)
class Glanced:
    """A record and what was read of it. `deadline` is Unix time in seconds; `size` is in bytes.

    `adapter_id` is without its pin, None for the base model. It is read from the value, which is what counts; the
    record's key is the producer's own affair, and may be anything.
    """

    record: Record
    adapter_id: str | None
    request_id: str | None
    priority: int
    deadline: float | None

    @property
    def size(self) -> int:
        """About what it takes in memory."""
        return len(self.record.value or b"") + OVERHEAD


def glance(record: Record) -> Glanced:
    """Look at a record. Raises nothing: one that is no request is `UNREADABLE`, which its answerer will explain."""
    try:
        fields = _DECODER.decode(record.value or b"")
    except (ValueError, RecursionError):  # msgspec's errors are ValueErrors
        return Glanced(record, UNREADABLE, None, 0, None)
    adapter_id = None if fields.adapter_id is None else fields.adapter_id.partition("@")[0]
    deadline = None if fields.deadline_ms is None else fields.deadline_ms / 1000
    return Glanced(record, adapter_id, fields.request_id, fields.priority or 0, deadline)
