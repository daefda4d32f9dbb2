"""What is read from Kafka and what is written to it, without a client's own types."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Record:
    """One message as it was polled. A header's value may be None: Kafka allows it.

    `epoch` names the stretch of time in which this worker owns `partition` without a break; it is never used
    twice in one process, so (partition, epoch) tells a record of now from the same record before a rebalance.
    """

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...]
    timestamp_ms: int
    epoch: int


@dataclass(frozen=True, slots=True)
class OutgoingRecord:
    """One message to send; without a partition the key chooses it."""

    topic: str
    key: bytes | None
    value: bytes | None
    headers: tuple[tuple[str, bytes], ...] = ()
    partition: int | None = None
