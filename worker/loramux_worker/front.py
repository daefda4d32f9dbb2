"""The front: takes records, has each answered by a task of its own, and has the answers delivered.

intake ─► window (seats, parking) ─► Answerer (one task a request) ─► delivery
                                        │ catalog   tokenizers   pool
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog

from loramux_worker.alarms import Alarms
from loramux_worker.answer import Answerer
from loramux_worker.cancellations import Cancellations
from loramux_worker.glance import Glanced, glance
from loramux_worker.kafka.delivery import Delivery
from loramux_worker.kafka.intake import Intake
from loramux_worker.kafka.publisher import Publisher
from loramux_worker.kafka.records import OutgoingRecord, Record
from loramux_worker.kafka.sending import RecordRefused
from loramux_worker.look_ahead import Window
from loramux_worker.replies import ReplyWriter
from loramux_worker.stopwatch import Stopwatch

if TYPE_CHECKING:
    from loramux_worker.tracing import Tracing

log = structlog.get_logger(__name__)

_TAKE_TIMEOUT = 0.2  # seconds that one look into Kafka waits


class Front:
    """Takes records as far as the window allows and has each answered by a task of its own, once it has a seat."""

    def __init__(
        self,
        intake: Intake,
        answerer: Answerer,
        replies: ReplyWriter,
        publisher: Publisher,
        delivery: Delivery,
        window: Window,
        cancellations: Cancellations,
        tracing: Tracing | None = None,
    ) -> None:
        self._intake = intake
        self._answerer = answerer
        self._replies = replies
        self._publisher = publisher
        self._delivery = delivery
        self._window = window
        self._alarms = Alarms(cancellations, self._expedite)
        self._tracing = tracing
        self._tasks: dict[asyncio.Task[None], Glanced] = {}
        self._seated: set[Glanced] = set()
        self._freed = asyncio.Event()
        self._starter: asyncio.Handle | None = None
        self._drain_began: float | None = None

    @property
    def in_flight(self) -> int:
        """Requests that are worked on: begun and not answered yet."""
        return len(self._tasks)

    @property
    def parked(self) -> int:
        """Requests that were taken and wait until their adapter has room."""
        return self._window.parked

    @property
    def draining_seconds(self) -> float:
        """Seconds since the drain began, 0 before it."""
        return 0.0 if self._drain_began is None else time.monotonic() - self._drain_began

    async def take_requests(self) -> None:
        """Take records and start answering them until `drain`."""
        while self._drain_began is None:
            if self._window.room <= 0:
                self._freed.clear()
                await self._freed.wait()
                continue
            records = await self._intake.take(self._window.room, _TAKE_TIMEOUT, self._window.full_partitions)
            if self._drain_began is None:
                self._park(records)
            await asyncio.sleep(0)  # what the consumer has fetched before, it gives without a turn for anybody else

    async def drain(self, timeout: float) -> None:
        """Take nothing more; let what runs finish for `timeout` seconds, then give it up (it stays in Kafka).

        What is parked is given up at once.
        """
        self._drain_began = time.monotonic()
        self._freed.set()
        self._alarms.disarm(self._window.clear())
        if self._tasks:
            log.info("draining", in_flight=self.in_flight, timeout=timeout)
            await asyncio.wait(self._tasks, timeout=timeout)
        await self._cancel(list(self._tasks))

    def lose(self, lost: Collection[tuple[int, int]]) -> None:
        """These (partition, epoch) belong to another worker now: stop working on their requests."""
        self._alarms.disarm(self._window.lose(lost))
        for task, request in self._tasks.items():
            if (request.record.partition, request.record.epoch) in lost:
                task.cancel()
        self._freed.set()

    def _park(self, records: list[Record]) -> None:
        for record in records:
            request = glance(record)
            self._window.park(request)
            self._alarms.arm(request)
        self._start_soon()

    def _start_soon(self) -> None:
        if self._starter is None:
            self._starter = asyncio.get_running_loop().call_soon(self._start)

    def _start(self) -> None:
        """Begin the next request that has a seat, and the others in later turns of the event loop, one in each.

        Parsing a prompt takes most of a millisecond: hundreds of a flood in one turn would hold up everybody's tokens.
        """
        self._starter = None
        if (request := self._window.start()) is not None:
            self._alarms.disarm([request])
            self._seated.add(request)
            self._begin(request)
            self._start_soon()

    def _expedite(self, request: Glanced) -> None:
        """Answer a parked request that was cancelled or is late. It wants no engine, so it needs no seat."""
        if self._window.withdraw(request):
            self._alarms.disarm([request])
            self._begin(request)
            self._freed.set()

    def _begin(self, request: Glanced) -> None:
        record = request.record
        task = asyncio.create_task(self._answer(record), name=f"{record.partition}/{record.offset}")
        self._tasks[task] = request
        task.add_done_callback(self._finished)

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
        if any(refused.record is each for each in replaced):
            log.error("answer_impossible", topic=refused.record.topic, reason=refused.reason)
            return tuple(answer for answer in answers if answer is not refused.record)
        replaced.append(self._in_place(record, refused.record, str(refused)))
        return tuple(replaced[-1] if answer is refused.record else answer for answer in answers)

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
        request = self._tasks.pop(task)
        if request in self._seated:
            self._seated.remove(request)
            self._window.finish(request)
            self._start_soon()
        self._freed.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            # the record stays undone: it is read again by whoever owns the partition next
            log.error("answer_lost", record=task.get_name(), exc_info=error)

    async def _cancel(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
