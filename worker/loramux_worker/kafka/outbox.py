"""Answers of one partition on their way into transactions."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

import structlog

from loramux_worker.kafka.assignment import Assignment, Partition
from loramux_worker.kafka.commits import COMMIT_SECONDS, commit_of
from loramux_worker.kafka.connecting import TROUBLE
from loramux_worker.kafka.group_offsets import Commit
from loramux_worker.kafka.outage import explain
from loramux_worker.kafka.records import OutgoingRecord
from loramux_worker.kafka.sending import RecordRefused
from loramux_worker.kafka.transactions import TransactionFailed

MAX_ANSWERS: Final = 1000  # of one transaction
MAX_BYTES: Final = 2 << 20  # of one transaction, beside one answer at least
MAX_HALVINGS: Final = 16
PACE_SECONDS: Final = 0.02  # between the beginnings of two transactions
# Another producer of our id, and the group has not said yet that the partition went to it: it will. If it does
# not, the partition is ours, and what fenced us was a transaction that took too long.
FENCED_SECONDS: Final = 3.0

log = structlog.get_logger(__name__)

Transact = Callable[[list[OutgoingRecord], Commit], Awaitable[None]]
Check = Callable[[OutgoingRecord], Awaitable[None]]


@dataclass(eq=False, slots=True)
class Answer:
    """What answers the request at `offset`; `safe` is done when that is committed."""

    offset: int
    records: tuple[OutgoingRecord, ...]
    safe: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Outbox:
    """Commits the answers of one (partition, epoch), in as few transactions as the pace allows.

    `transact` commits records together with a position, or raises TransactionFailed. After a failure nobody
    knows whether it has succeeded: the partition is closed until the group's commit has been read again, and
    `reopened` tells by it. What failed is tried again in smaller transactions, after `check` has looked at the
    place of each of its records; it raises RecordRefused for one that has gone.
    """

    def __init__(self, assignment: Assignment, partition: Partition, transact: Transact, check: Check) -> None:
        self._assignment = assignment
        self._partition = partition
        self._transact = transact
        self._check = check
        self._failures = 0  # transactions that failed since the last one that did not
        self._waiting: dict[int, Answer] = {}
        self._in_doubt: tuple[dict[int, Answer], Commit] | None = None
        self._due = asyncio.Event()
        self._rounds: list[asyncio.Future[None]] = []
        self._in_transaction = asyncio.Lock()
        self._task = asyncio.create_task(self._keep_committing(), name=f"transactions-{partition.number}")

    async def answered(self, offset: int, records: tuple[OutgoingRecord, ...]) -> None:
        """Returns when the answer is committed. Raises RecordRefused, and CancelledError when the partition is lost."""
        answer = self._waiting[offset] = Answer(offset, records)
        self._due.set()
        try:
            await answer.safe
        finally:
            if self._waiting.get(offset) is answer:  # nobody waits for it any more
                del self._waiting[offset]

    async def flush(self) -> None:
        """Returns when what waits now is committed, or cannot be at the moment."""
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._rounds.append(done)
        self._due.set()
        await done

    async def rest(self) -> None:
        """Returns when no transaction is under way."""
        async with self._in_transaction:
            pass

    def reopened(self) -> None:
        """The partition is open, and what is committed for it is known."""
        if self._in_doubt is not None:
            (answers, commit), self._in_doubt = self._in_doubt, None
            if self._partition.committed == commit:
                self._settle(answers)
            else:
                self._waiting = {**answers, **self._waiting}
        self._due.set()

    async def close(self) -> None:
        """Commits nothing more; whoever waits is cancelled."""
        self._task.cancel()
        await asyncio.wait([self._task])
        in_doubt = {} if self._in_doubt is None else self._in_doubt[0]
        for answer in [*self._waiting.values(), *in_doubt.values()]:
            answer.safe.cancel()
        self._end_rounds()

    async def _keep_committing(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._due.wait()
            self._due.clear()
            began = loop.time()
            rounds, self._rounds = self._rounds, []
            try:
                async with self._in_transaction:
                    if self._partition.is_open:
                        await self._commit()
            except Exception:  # a bug of ours: what is in doubt is settled as after any other failure
                log.exception("commit_failed", partition=self._partition.number)
                self._assignment.reopen(self._partition, FENCED_SECONDS)
            finally:
                self._end_rounds(rounds)
            if self._waiting and self._partition.is_open:
                self._due.set()
            await asyncio.sleep(began + PACE_SECONDS - loop.time())

    async def _commit(self) -> None:
        """One transaction, if anything has changed."""
        partition = self._partition
        try:
            async with asyncio.timeout(COMMIT_SECONDS):
                if self._failures:
                    await self._check_places()
                answers = self._next_answers()
                commit = await commit_of(self._assignment, partition, answers.keys())
        except TROUBLE as error:  # a rebalance: the position is not known
            log.info("commit_deferred", partition=partition.number, reason=explain(error))
            return
        if commit == partition.committed:
            return
        for offset in answers:
            self._waiting.pop(offset, None)
        partition.unconfirmed.add(commit)
        self._in_doubt = answers, commit
        try:
            await self._transact([record for each in answers.values() for record in each.records], commit)
        except TransactionFailed as failed:
            self._failures += 1
            if (refused := failed.refused) is not None:
                self._refuse(answers, partial(operator.is_, refused.record), refused.reason)
            self._assignment.reopen(partition, FENCED_SECONDS if failed.fenced else 0.0)
        else:
            self._failures = 0
            self._in_doubt = None
            partition.confirm(commit)
            self._settle(answers)

    def _next_answers(self) -> dict[int, Answer]:
        """Those that the next transaction is to hold, the longest waiting first."""
        halvings = min(self._failures, MAX_HALVINGS)
        answers: dict[int, Answer] = {}
        size = 0
        for offset, answer in self._waiting.items():
            size += sum(len(record.value or b"") for record in answer.records)
            if answers and (len(answers) >= MAX_ANSWERS >> halvings or size > MAX_BYTES >> halvings):
                break
            answers[offset] = answer
        return answers

    async def _check_places(self) -> None:
        """Refuses what waits for a place that has gone."""
        places = {_place(record): record for each in self._waiting.values() for record in each.records}
        for place, record in places.items():
            try:
                await self._check(record)
            except RecordRefused as refused:
                self._refuse(self._waiting, partial(_is_at, place), refused.reason)

    def _settle(self, answers: dict[int, Answer]) -> None:
        for offset, answer in answers.items():
            self._assignment.done(self._partition, offset)
            if not answer.safe.done():
                answer.safe.set_result(None)

    def _refuse(self, answers: dict[int, Answer], is_refused: Callable[[OutgoingRecord], bool], reason: str) -> None:
        """Takes those with a record that is refused out of `answers`, and says so to who waits for them."""
        for offset, answer in list(answers.items()):
            record = next(filter(is_refused, answer.records), None)
            if record is not None:
                del answers[offset]
                if not answer.safe.done():
                    answer.safe.set_exception(RecordRefused(record, reason))

    def _end_rounds(self, rounds: list[asyncio.Future[None]] | None = None) -> None:
        for each in self._rounds if rounds is None else rounds:
            if not each.done():
                each.set_result(None)


def _place(record: OutgoingRecord) -> tuple[str, int | None]:
    return record.topic, record.partition


def _is_at(place: tuple[str, int | None], record: OutgoingRecord) -> bool:
    return _place(record) == place
