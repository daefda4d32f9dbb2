"""Which partitions are ours, from one rebalance of the consumer group to the next.

    revoked     what is done is committed; then nothing is read or committed, and generation goes on
    assigned    partitions that are not ours any more are lost: their sequences are to be cancelled
    opened      a partition that came back goes on with its tracker, unless somebody else committed meanwhile;
                a new one begins at the group's committed offset

aiokafka stops heartbeats during `on_partitions_assigned` and only logs what goes wrong in a callback. So
partitions are opened by a task beside it, which tries again until it succeeds; and as a rejoin sets every
position back to the committed offset, no partition is read before the task has sought to its place.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

import structlog
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.abc import ConsumerRebalanceListener

from loramux_worker.kafka.commits import Commits
from loramux_worker.kafka.connecting import RETRY_SECONDS, TROUBLE
from loramux_worker.kafka.group_offsets import Commit, Membership, OffsetsUnstable
from loramux_worker.kafka.metadata import decode
from loramux_worker.kafka.outage import Outage, explain
from loramux_worker.kafka.tracker import OffsetsTracker

OPEN_SECONDS: Final = 20.0

log = structlog.get_logger(__name__)

OnLost = Callable[[frozenset[tuple[int, int]]], None]


@dataclass(slots=True, eq=False)
class Partition:
    """One of our partitions. `unconfirmed` are commits that were sent and never answered."""

    name: TopicPartition
    epoch: int
    tracker: OffsetsTracker
    committed: Commit
    unconfirmed: set[Commit] = field(default_factory=set)
    is_open: bool = False

    @property
    def number(self) -> int:
        """The partition's number in its topic."""
        return int(self.name.partition)

    def confirm(self, commit: Commit) -> None:
        """This is what is committed now."""
        self.committed = commit
        self.unconfirmed.clear()


class Assignment(ConsumerRebalanceListener):  # type: ignore[misc]
    """Partition number → tracker, and the listener that keeps it right.

    `on_lost` gets the (partition, epoch) pairs whose sequences have lost their point. `member` is who may commit the
    partitions that are open.
    """

    def __init__(self, *, topic: str, window: int, commits: Commits, on_lost: OnLost) -> None:
        self.joined = False
        self.member = Membership(-1, "")
        self.failure: str | None = None
        self.outage = Outage("opening partitions")
        self._topic = topic
        self._window = window
        self._commits = commits
        self._on_lost = on_lost
        self._partitions: dict[int, Partition] = {}
        self._epochs = itertools.count(1)
        self._opening: set[asyncio.Task[None]] = set()
        self._changed = asyncio.Event()
        self._consumer: AIOKafkaConsumer | None = None
        commits.attach(self)

    @property
    def consumer(self) -> AIOKafkaConsumer:
        """The client that our partitions are assigned to."""
        assert self._consumer is not None, "attach a consumer first"
        return self._consumer

    def attach(self, consumer: AIOKafkaConsumer) -> None:
        """The consumer that will call back; with a new one everything waits for its first assignment."""
        self._suspend()
        self._stop_opening()
        self._consumer = consumer

    def open_partitions(self) -> list[Partition]:
        """The partitions that may be read and committed now."""
        return [partition for partition in self._partitions.values() if partition.is_open]

    def open_partition(self, number: int) -> Partition | None:
        """The partition if it may be read and committed now."""
        partition = self._partitions.get(number)
        return partition if partition is not None and partition.is_open else None

    def held(self, number: int, epoch: int) -> Partition | None:
        """The partition if it is still ours in that epoch, open or waiting for the end of a rebalance."""
        partition = self._partitions.get(number)
        return partition if partition is not None and partition.epoch == epoch else None

    def done(self, partition: Partition, offset: int) -> bool:
        """The request at `offset` is answered; False if it was not in flight."""
        was_full = partition.tracker.is_full
        counted = partition.tracker.done(offset)
        if was_full and not partition.tracker.is_full:
            self.notify()
        return counted

    def reopen(self, partitions: Iterable[Partition], after: float) -> None:
        """Nobody knows what is committed: neither read nor commit these until the cluster has said so.

        That is asked `after` so many seconds, unless the group has spoken by then, and not while it decides. Those
        that are closed already are lost, or opened by whoever closed them: a second one might open with what was
        committed before the first.
        """
        closed = [partition for partition in partitions if partition.is_open]
        for partition in closed:
            partition.is_open = False
        if self.joined and closed:
            self._start_opening({partition.number for partition in closed}, after=after)

    def begin_again(self, partition: Partition) -> None:
        """The group's commit is of no use: read the partition from its first offset, in a new epoch."""
        self._lose([partition])
        if self.joined:
            self._start_opening({partition.number}, from_first_offset=True)

    def notify(self) -> None:
        """Something changed that may let `changed` waiters read again."""
        self._changed.set()

    async def changed(self, timeout: float) -> None:
        """Waits for the next `notify`, for `timeout` seconds at most."""
        self._changed.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._changed.wait()

    async def close(self) -> None:
        """Stops opening partitions."""
        self._stop_opening()
        if self._opening:
            await asyncio.wait(self._opening)

    async def on_partitions_revoked(self, revoked: Iterable[TopicPartition]) -> None:
        """A rebalance begins: commit what is done while it is surely ours (heartbeats go on meanwhile)."""
        self.joined = False
        try:
            await self.close()
            await self._commits.commit()
        except Exception as error:
            self._fail("on_partitions_revoked", error)
        self._suspend()

    def on_partitions_assigned(self, assigned: Iterable[TopicPartition]) -> None:
        """A rebalance is over: forget what is lost, open what is ours."""
        try:
            ours = {each.partition for each in assigned}
            self._stop_opening()  # what was ours before may be somebody else's
            self._lose([partition for number, partition in self._partitions.items() if number not in ours])
            self.member = Membership.of(self.consumer)
            self.joined = True
            self._start_opening(ours)
        except Exception as error:
            self._fail("on_partitions_assigned", error)

    def _stop_opening(self) -> None:
        for task in self._opening:
            task.cancel()

    def _start_opening(self, numbers: set[int], *, after: float = 0.0, from_first_offset: bool = False) -> None:
        task = asyncio.create_task(self._open_all(numbers, after, from_first_offset), name="open-partitions")
        self._opening.add(task)
        task.add_done_callback(self._opening.discard)

    async def _open_all(self, numbers: set[int], after: float, from_first_offset: bool) -> None:
        await asyncio.sleep(after)
        waiting = set(numbers)
        while waiting:
            try:
                async with asyncio.timeout(OPEN_SECONDS):
                    claimed = await self._commits.claim(waiting)
                    for number in sorted(claimed):
                        commit = None if from_first_offset else claimed[number]
                        if await self._open(TopicPartition(self._topic, number), commit):
                            waiting.discard(number)
            except OffsetsUnstable as error:  # of a worker that died: soon given up
                log.info("partitions_wait", reason=explain(error))
                await asyncio.sleep(RETRY_SECONDS)
            except TROUBLE as error:
                self.outage.failed(f"opening partitions {sorted(waiting)}", error)
                await asyncio.sleep(RETRY_SECONDS)
            except Exception as error:
                self._fail("opening partitions", error)
                await asyncio.sleep(RETRY_SECONDS)
        self.outage.over()
        self.failure = None
        log.info("partitions_assigned", topic=self._topic, partitions=sorted(numbers))

    async def _open(self, name: TopicPartition, commit: Commit | None) -> bool:
        """Whether the partition is open now; if not, it has to be claimed anew."""
        partition = self._partitions.get(name.partition)
        if partition is None:
            partition = self._partitions[name.partition] = await self._begin(name, commit)
        elif commit is not None and commit in {partition.committed, *partition.unconfirmed}:
            partition.confirm(commit)
        else:
            # Somebody else owned it in between: our in-flight requests are answered or will be read again.
            self._lose([partition])
            return False
        self.consumer.seek(name, partition.tracker.next_position)
        partition.is_open = True
        self._commits.opened(partition)
        self.notify()
        return True

    async def _begin(self, name: TopicPartition, commit: Commit | None) -> Partition:
        if commit is None:
            # Written down before anything is read: from here on no position is ever anybody's default.
            commit = Commit((await self.consumer.beginning_offsets([name]))[name], "")
            await self.consumer.commit({name: tuple(commit)})
        try:
            answered = decode(commit.position, commit.metadata)
        except ValueError as error:
            log.warning("commit_metadata_unreadable", partition=name.partition, reason=str(error))
            answered = frozenset()
        tracker = OffsetsTracker(commit.position, max_window=self._window, answered=answered)
        return Partition(name, next(self._epochs), tracker, commit)

    def _suspend(self) -> None:
        self.joined = False
        for partition in self._partitions.values():
            partition.is_open = False

    def _lose(self, partitions: list[Partition]) -> None:
        if not partitions:
            return
        for partition in partitions:
            partition.is_open = False
            del self._partitions[partition.number]
        self._commits.lost(partitions)
        lost = frozenset((partition.number, partition.epoch) for partition in partitions)
        log.info("partitions_lost", topic=self._topic, partitions=sorted(number for number, _ in lost))
        self._on_lost(lost)

    def _fail(self, doing: str, error: Exception) -> None:
        self.failure = f"{doing}: {explain(error)}"
        log.exception("rebalance_failed", doing=doing, exc_info=error)
