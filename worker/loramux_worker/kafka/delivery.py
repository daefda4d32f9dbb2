"""When a request counts as answered. The front calls `complete` and leaves the order of things to it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from loramux_worker.kafka.intake import Intake
from loramux_worker.kafka.publisher import Publisher
from loramux_worker.kafka.records import OutgoingRecord, Record


class Delivery(Protocol):
    """What a front needs of a way to deliver."""

    async def complete(self, record: Record, outgoing: Sequence[OutgoingRecord]) -> None:
        """Sends the answers to `record`; returns when they are safe and the record is done.

        Does nothing for a record whose partition went to another worker, which answers it. Raises
        RecordRefused for an answer that the cluster does not take: the record is not done, and wants other
        answers, all of them.
        """


class AtLeastOnce:
    """Acknowledged answers first, the committed offset later: a crash in between answers twice."""

    def __init__(self, publisher: Publisher, intake: Intake) -> None:
        self._publisher = publisher
        self._intake = intake

    async def complete(self, record: Record, outgoing: Sequence[OutgoingRecord]) -> None:
        """Sends, waits for every acknowledgement, then marks the record as done."""
        if not self._intake.holds(record):
            return
        for answer in outgoing:  # one after the other: behind a refused dead letter no reply has gone out yet
            await self._publisher.send([answer])
        self._intake.done(record)
