"""The front: takes records, has each answered by a task of its own, and has the answers delivered.

intake ─► Answerer (one task a request) ─► delivery
             │ catalog   tokenizers   pool
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from loramux_worker.answer import Answerer
from loramux_worker.kafka.delivery import Delivery
from loramux_worker.kafka.intake import Intake
from loramux_worker.kafka.publisher import Publisher
from loramux_worker.kafka.records import OutgoingRecord, Record
from loramux_worker.kafka.sending import RecordRefused
from loramux_worker.replies import ReplyWriter
from loramux_worker.stopwatch import Stopwatch

if TYPE_CHECKING:
    from loramux_worker.tracing import Tracing

log = structlog.get_logger(__name__)

_TAKE_TIMEOUT = 0.2  # seconds that one look into Kafka waits


class Front:
    """Takes records as far as the look-ahead allows and has each answered by a task of its own."""

    def __init__(
        self,
        intake: Intake,
        answerer: Answerer,
        replies: ReplyWriter,
        publisher: Publisher,
        delivery: Delivery,
        look_ahead: int,
        tracing: Tracing | None = None,
    ) -> None:
        self._intake = intake
        self._answerer = answerer
        self._replies = replies
        self._publisher = publisher
        self._delivery = delivery
        self._look_ahead = look_ahead
        self._tracing = tracing
        self._tasks: dict[asyncio.Task[None], tuple[int, int]] = {}
        self._freed = asyncio.Event()
        self._drain_began: float | None = None

    @property
    def in_flight(self) -> int:
        """Requests that were taken and not answered yet."""
        return len(self._tasks)

    @property
    def draining_seconds(self) -> float:
        """Seconds since the drain began, 0 before it."""
        return 0.0 if self._drain_began is None else time.monotonic() - self._drain_began

    async def take_requests(self) -> None:
        """Take records and start answering them until `drain`."""
        while self._drain_began is None:
            room = self._look_ahead - self.in_flight
            if room <= 0:
                self._freed.clear()
                await self._freed.wait()
                continue
            for record in await self._intake.take(room, _TAKE_TIMEOUT):
                if self._drain_began is not None:
                    return  # what was taken just now is read again by whoever owns the partition next
                task = asyncio.create_task(self._answer(record), name=f"{record.partition}/{record.offset}")
                self._tasks[task] = (record.partition, record.epoch)
                task.add_done_callback(self._finished)

    async def drain(self, timeout: float) -> None:
        """Take nothing more; let what runs finish for `timeout` seconds, then give it up (it stays in Kafka)."""
        self._drain_began = time.monotonic()
        self._freed.set()
        if self._tasks:
            log.info("draining", in_flight=self.in_flight, timeout=timeout)
            await asyncio.wait(self._tasks, timeout=timeout)
        await self._cancel(list(self._tasks))

    def lose(self, lost: Collection[tuple[int, int]]) -> None:
        """These (partition, epoch) belong to another worker now: stop working on their requests."""
        for task, owner in self._tasks.items():
            if owner in lost:
                task.cancel()

    async def _answer(self, record: Record) -> None:
        structlog.contextvars.bind_contextvars(partition=record.partition, offset=record.offset)
        watch = Stopwatch(record.timestamp_ms)
        answers = tuple(self._fitting(record, answer) for answer in await self._answerer(record, watch))
        replaced: list[OutgoingRecord] = []
        while True:
            try:
                await self._delivery.complete(record, answers)
                break
            except RecordRefused as refused:
                log.warning("answer_refused", topic=refused.record.topic, reason=refused.reason)
                answers = self._without(record, answers, refused, replaced)
        if self._tracing is not None:
            self._tracing.answered(record, answers, watch)

    def _without(
        self,
        record: Record,
        answers: tuple[OutgoingRecord, ...],
        refused: RecordRefused,
        replaced: list[OutgoingRecord],
    ) -> tuple[OutgoingRecord, ...]:
        """The answers with another in place of the refused one, or none where that was one already."""
        others = tuple(answer for answer in answers if answer is not refused.record)
        if any(refused.record is each for each in replaced):
            log.error("answer_impossible", topic=refused.record.topic, reason=refused.reason)
            return others
        replaced.append(self._in_place(record, refused.record, str(refused)))
        return (*others, replaced[-1])

    def _fitting(self, record: Record, answer: OutgoingRecord) -> OutgoingRecord:
        if self._publisher.fits(answer):
            return answer
        size = len(answer.value or b"")
        return self._in_place(record, answer, f"the reply has {size} bytes, more than topic {answer.topic} takes")

    def _in_place(self, record: Record, answer: OutgoingRecord, reason: str) -> OutgoingRecord:
        instead = self._replies.instead(record, answer, reason)
        # what was sent to us as key or headers may be as large as a record can be
        return instead if self._publisher.fits(instead) else replace(instead, key=None, headers=())

    def _finished(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        self._freed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            # the record stays undone: it is read again by whoever owns the partition next
            log.error("answer_lost", record=task.get_name(), exc_info=error)

    async def _cancel(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
