"""Answers on their way into transactions."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Awaitable, Callable, Collection, Iterable
from dataclasses import dataclass, field
from functools import partial
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
PACE_SECONDS: Final = 0.02  # between the beginnings of two transactions
# The group has gone on without us, and will say so to our consumer. If it does not, what fenced us was a
# transaction that took too long.
FENCED_SECONDS: Final = 3.0

log = structlog.get_logger(__name__)

Check = Callable[[OutgoingRecord], Awaitable[None]]


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


class Outbox:
    """Commits a worker's answers, in as few transactions as the pace allows.

    After a failure nobody knows whether a transaction has succeeded: its partitions are closed until the group's
    commit has been read again, and `reopened` tells by it. What failed is tried again in smaller transactions,
    after `check` has looked at the place of each record; it raises RecordRefused for one that has gone.
    """

    def __init__(self, assignment: Assignment, transactions: Transactions, check: Check) -> None:
        self._assignment = assignment
        self._transactions = transactions
        self._check = check
        self._failures = 0  # transactions that failed since the last one that did not
        self._waiting: dict[Answer, None] = {}  # the longest waiting first
        self._in_doubt: dict[Partition, Doubt] = {}
        self._due = asyncio.Event()
        self._rounds: list[asyncio.Future[None]] = []
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
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._rounds.append(done)
        self._due.set()
        await asyncio.wait([done], timeout=seconds)

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
            self._waiting = dict.fromkeys([*doubt.answers, *self._waiting])
        self._due.set()

    def lost(self, partition: Partition) -> None:
        """Commits no more answers of the partition; whoever waits for one is cancelled."""
        doubt = self._in_doubt.pop(partition, None)
        for answer in [*self._waiting, *(doubt.answers if doubt is not None else ())]:
            if answer.partition is partition:
                answer.safe.cancel()
                self._waiting.pop(answer, None)

    async def close(self) -> None:
        """Commits nothing more; whoever waits is cancelled."""
        self._task.cancel()
        await asyncio.wait([self._task])
        for partition in {answer.partition for answer in self._waiting} | self._in_doubt.keys():
            self.lost(partition)
        _end(self._rounds)

    async def _keep_committing(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._due.wait()
            self._due.clear()
            began = loop.time()
            rounds, self._rounds = self._rounds, []
            try:
                async with self._in_transaction:
                    await self._commit(everywhere=bool(rounds))
            except Exception:  # a bug of ours: what is in doubt is settled as after any other failure
                log.exception("commit_failed")
                self._assignment.reopen(self._in_doubt, FENCED_SECONDS)
            finally:
                _end(rounds)
            if any(answer.partition.is_open for answer in self._waiting):
                self._due.set()
            await asyncio.sleep(began + PACE_SECONDS - loop.time())

    async def _commit(self, *, everywhere: bool) -> None:
        """One transaction, if anything has changed: `everywhere`, or where there are answers."""
        try:
            async with asyncio.timeout(COMMIT_SECONDS):
                if self._failures:
                    await self._check_places()
                answers = self._next_answers()
                commits = await self._commits(answers, everywhere)
        except TROUBLE as error:  # a rebalance: the position is not known
            log.info("commit_deferred", reason=explain(error))
            return
        try:
            await self._transactions.ready()
        except TROUBLE as error:
            self._transactions.outage.failed("beginning a transaction", error)
            await asyncio.sleep(RETRY_SECONDS)
            return
        # From here to the transaction nothing is waited for: the generation is the one in which these are open.
        commits = {each: commit for each, commit in commits.items() if each.is_open and commit != each.committed}
        if commits:
            await self._transact(commits, [answer for answer in answers if answer.partition in commits])

    async def _commits(self, answers: Iterable[Answer], everywhere: bool) -> dict[Partition, Commit]:
        offsets: dict[Partition, set[int]] = {}
        if everywhere:
            offsets = {partition: set() for partition in self._assignment.open_partitions()}
        for answer in answers:
            offsets.setdefault(answer.partition, set()).add(answer.offset)
        return {each: await commit_of(self._assignment, each, answered) for each, answered in offsets.items()}

    async def _transact(self, commits: dict[Partition, Commit], answers: Collection[Answer]) -> None:
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
                    self._refuse(doubt.answers, partial(operator.is_, refused.record), refused.reason)
            self._assignment.reopen(commits, FENCED_SECONDS if failed.fenced else 0.0)
        else:
            self._failures = 0
            for partition in commits.keys() & self._in_doubt.keys():  # the others are lost meanwhile
                doubt = self._in_doubt.pop(partition)
                partition.confirm(doubt.commit)
                self._settle(doubt.answers)

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

    async def _check_places(self) -> None:
        """Refuses what waits for a place that has gone."""
        places = {_place(record): record for each in self._waiting for record in each.records}
        for place, record in places.items():
            try:
                await self._check(record)
            except RecordRefused as refused:
                waiting = list(self._waiting)
                self._refuse(waiting, partial(_is_at, place), refused.reason)
                self._waiting = dict.fromkeys(waiting)

    def _settle(self, answers: Iterable[Answer]) -> None:
        for answer in answers:
            self._assignment.done(answer.partition, answer.offset)
            if not answer.safe.done():
                answer.safe.set_result(None)

    def _refuse(self, answers: list[Answer], is_refused: Callable[[OutgoingRecord], bool], reason: str) -> None:
        """Takes those with a record that is refused out of `answers`, and says so to who waits for them."""
        for answer in list(answers):
            record = next(filter(is_refused, answer.records), None)
            if record is not None:
                answers.remove(answer)
                if not answer.safe.done():
                    answer.safe.set_exception(RecordRefused(record, reason))


def _end(rounds: Iterable[asyncio.Future[None]]) -> None:
    for each in rounds:
        if not each.done():
            each.set_result(None)


def _place(record: OutgoingRecord) -> tuple[str, int | None]:
    return record.topic, record.partition


def _is_at(place: tuple[str, int | None], record: OutgoingRecord) -> bool:
    return _place(record) == place
