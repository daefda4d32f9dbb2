"""Answers on their way into transactions."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import Final

import structlog

from loramux_worker.kafka.assignment import Assignment, Partition
from loramux_worker.kafka.commits import COMMIT_SECONDS, commit_of
from loramux_worker.kafka.connecting import RETRY_SECONDS, TROUBLE
from loramux_worker.kafka.group_offsets import Commit
from loramux_worker.kafka.outage import explain
from loramux_worker.kafka.records import OutgoingRecord
from loramux_worker.kafka.sending import RecordRefused
from loramux_worker.kafka.transactional_producer import TransactionFailed
from loramux_worker.kafka.transactions import Transactions

MAX_ANSWERS: Final = 1000  # of one transaction
MAX_BYTES: Final = 2 << 20  # of one transaction, beside one answer at least
MAX_HALVINGS: Final = 16
PACE_SECONDS: Final = 0.02  # between the beginnings of two transactions, where they take less than half of it
SLOWEST_PACE_SECONDS: Final = 0.05
# The group has gone on without us, and will say so to our consumer. If it does not, what fenced us was a
# transaction that took too long.
FENCED_SECONDS: Final = 3.0

log = structlog.get_logger(__name__)

WithoutPlace = Callable[[Iterable[OutgoingRecord]], Awaitable[list[OutgoingRecord]]]


@dataclass(eq=False, slots=True)
class Answer:
    """What answers the request at `offset`; `safe` is done when that is committed."""

    partition: Partition
    offset: int
    records: tuple[OutgoingRecord, ...]
    safe: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


@dataclass(eq=False, slots=True)
class Doubt:
    """What a transaction was to hold of one partition."""

    commit: Commit
    answers: list[Answer]


@dataclass(eq=False, slots=True)
class Round:
    """A flush: `done` when `last`, which was the newest, is committed or cannot be at the moment."""

    last: Answer | None
    done: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class Outbox:
    """Commits a worker's answers, in as few transactions as the pace allows: the longer they take, the fewer.

    After a failure nobody knows whether a transaction has succeeded: its partitions are closed until the group's
    commit has been read again, and `reopened` tells by it. What failed is tried again in smaller transactions,
    behind what came meanwhile and without what `without_place` finds to have lost its place.
    """

    def __init__(self, assignment: Assignment, transactions: Transactions, without_place: WithoutPlace) -> None:
        self._assignment = assignment
        self._transactions = transactions
        self._without_place = without_place
        self._failures = 0  # transactions that failed since the last one that did not
        self._waiting: dict[Answer, None] = {}  # the longest waiting first
        self._in_doubt: dict[Partition, Doubt] = {}
        self._due = asyncio.Event()
        self._rounds: list[Round] = []
        self._in_transaction = asyncio.Lock()
        self._task = asyncio.create_task(self._keep_committing(), name="transactions")

    async def answered(self, partition: Partition, offset: int, records: tuple[OutgoingRecord, ...]) -> None:
        """Returns when the answer is committed. Raises RecordRefused, and CancelledError when the partition is lost."""
        answer = Answer(partition, offset, records)
        self._waiting[answer] = None
        self._due.set()
        try:
            await answer.safe
        finally:
            self._waiting.pop(answer, None)  # nobody waits for it any more

    async def flush(self, seconds: float) -> None:
        """Returns when what waits now is committed, or cannot be at the moment; after `seconds` in any case."""
        flush = Round(next(reversed(self._waiting), None))
        self._rounds.append(flush)
        self._due.set()
        await asyncio.wait([flush.done], timeout=seconds)

    async def rest(self) -> None:
        """Returns when no transaction is under way."""
        async with self._in_transaction:
            pass

    def reopened(self, partition: Partition) -> None:
        """The partition is open, and what is committed for it is known."""
        doubt = self._in_doubt.pop(partition, None)
        if doubt is not None and partition.committed == doubt.commit:
            self._settle(doubt.answers)
        elif doubt is not None:
            self._waiting.update(dict.fromkeys(doubt.answers))
        self._due.set()

    def lost(self, partitions: Collection[Partition]) -> None:
        """Commits no more answers of these partitions; whoever waits for one is cancelled."""
        doubts = [self._in_doubt.pop(partition) for partition in partitions if partition in self._in_doubt]
        waiting = [answer for answer in self._waiting if answer.partition in partitions]
        for answer in itertools.chain(waiting, *(doubt.answers for doubt in doubts)):
            answer.safe.cancel()
            self._waiting.pop(answer, None)

    async def close(self) -> None:
        """Commits nothing more; whoever waits is cancelled."""
        self._task.cancel()
        await asyncio.wait([self._task])
        self.lost({answer.partition for answer in self._waiting} | self._in_doubt.keys())
        self._end_rounds()

    async def _keep_committing(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._due.wait()
            self._due.clear()
            began, pace, gone_well = loop.time(), RETRY_SECONDS, False
            try:
                async with self._in_transaction:
                    gone_well = await self._commit(everywhere=bool(self._rounds))
                pace = min(max(PACE_SECONDS, 2 * (loop.time() - began)), SLOWEST_PACE_SECONDS)
            except TROUBLE as error:  # brokers are away, or a rebalance: the position is not known
                log.info("commit_deferred", reason=explain(error))
            except Exception:  # a bug of ours: what is in doubt is settled as after any other failure
                log.exception("commit_failed")
                self._assignment.reopen(self._in_doubt, FENCED_SECONDS)
            self._end_rounds(unless_waiting=gone_well)
            if self._rounds or any(answer.partition.is_open for answer in self._waiting):
                self._due.set()
            await asyncio.sleep(began + pace - loop.time())

    async def _commit(self, *, everywhere: bool) -> bool:
        """One transaction, if anything has changed: `everywhere`, or where there are answers. False if it failed."""
        async with asyncio.timeout(COMMIT_SECONDS):
            if self._failures:
                await self._refuse_what_has_no_place()
            answers = self._next_answers()
            commits = await self._commits(answers, everywhere)
        await self._transactions.ready()
        # From here to the transaction nothing is waited for: the generation is the one in which these are open.
        commits = {each: commit for each, commit in commits.items() if each.is_open and commit != each.committed}
        return not commits or await self._transact(commits, [each for each in answers if each.partition in commits])

    async def _commits(self, answers: Iterable[Answer], everywhere: bool) -> dict[Partition, Commit]:
        offsets: dict[Partition, set[int]] = {}
        if everywhere:
            offsets = {partition: set() for partition in self._assignment.open_partitions()}
        for answer in answers:
            offsets.setdefault(answer.partition, set()).add(answer.offset)
        return {each: await commit_of(self._assignment, each, answered) for each, answered in offsets.items()}

    async def _transact(self, commits: dict[Partition, Commit], answers: Collection[Answer]) -> bool:
        for partition, commit in commits.items():
            partition.unconfirmed.add(commit)
            self._in_doubt[partition] = Doubt(commit, [])
        for answer in answers:
            self._waiting.pop(answer, None)
            self._in_doubt[answer.partition].answers.append(answer)
        records = [record for answer in answers for record in answer.records]
        places = {partition.name: commit for partition, commit in commits.items()}
        try:
            await self._transactions.commit(records, places, self._assignment.member)
        except TransactionFailed as failed:
            self._failures += 1
            if (refused := failed.refused) is not None:
                for doubt in self._in_doubt.values():
                    doubt.answers = self._refuse(doubt.answers, [refused.record], refused.reason)
            self._assignment.reopen(commits, FENCED_SECONDS if failed.fenced else 0.0)
            return False
        self._failures = 0
        for partition in commits.keys() & self._in_doubt.keys():  # the others are lost meanwhile
            doubt = self._in_doubt.pop(partition)
            partition.confirm(doubt.commit)
            self._settle(doubt.answers)
        return True

    def _next_answers(self) -> list[Answer]:
        """Those that the next transaction is to hold, the longest waiting first."""
        halvings = min(self._failures, MAX_HALVINGS)
        answers: list[Answer] = []
        size = 0
        for answer in self._waiting:
            if not answer.partition.is_open:
                continue
            size += sum(len(record.value or b"") for record in answer.records)
            if answers and (len(answers) >= MAX_ANSWERS >> halvings or size > MAX_BYTES >> halvings):
                break
            answers.append(answer)
        return answers

    async def _refuse_what_has_no_place(self) -> None:
        gone = await self._without_place([record for answer in self._waiting for record in answer.records])
        if gone:
            reason = "there is no such topic or partition any more"
            self._waiting = dict.fromkeys(self._refuse(self._waiting, gone, reason))

    def _settle(self, answers: Iterable[Answer]) -> None:
        for answer in answers:
            self._assignment.done(answer.partition, answer.offset)
            if not answer.safe.done():
                answer.safe.set_result(None)

    def _refuse(self, answers: Iterable[Answer], refused: Iterable[OutgoingRecord], reason: str) -> list[Answer]:
        """`answers` without those that hold a `refused` record: who waits for them is told."""
        known = {id(record) for record in refused}
        kept = []
        for answer in answers:
            record = next((each for each in answer.records if id(each) in known), None)
            if record is None:
                kept.append(answer)
            elif not answer.safe.done():
                answer.safe.set_exception(RecordRefused(record, reason))
        return kept

    def _end_rounds(self, *, unless_waiting: bool = False) -> None:
        """Ends all flushes, or those of which nothing waits that could be committed."""
        rounds, self._rounds = self._rounds, []
        for each in rounds:
            if unless_waiting and each.last in self._waiting and each.last.partition.is_open:
                self._rounds.append(each)
            elif not each.done.done():
                each.done.set_result(None)
