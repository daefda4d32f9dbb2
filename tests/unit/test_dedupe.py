"""A message that comes again is answered from the first: in any order of arrivals, endings and interruptions."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from loramux_worker.dedupe import OVERHEAD, Answered, Duplicates, Key
from loramux_worker.kafka.records import OutgoingRecord, Record


def record(value: bytes, partition: int = 0, epoch: int = 1, offset: int = 0) -> Record:
    return Record("requests", partition, offset, b"k", value, (), 0, epoch)


def reply(text: str) -> OutgoingRecord:
    return OutgoingRecord("replies", b"r", text.encode())


def test_only_an_equal_message_of_the_same_owner_is_the_same() -> None:
    first = Key.of(record(b'{"request_id":"r","prompt":"x"}'))
    assert Key.of(record(b'{"request_id":"r","prompt":"x"}', offset=9)) == first
    assert Key.of(record(b'{"request_id":"r","prompt":"y"}')) != first
    assert Key.of(record(b'{"request_id":"r","prompt":"x"}', partition=1)) != first
    assert Key.of(record(b'{"request_id":"r","prompt":"x"}', epoch=2)) != first


async def test_a_window_of_nothing_runs_each() -> None:
    duplicates = Duplicates(0)
    runs = Counter[str]()

    async def run() -> Answered:
        runs["run"] += 1
        await asyncio.sleep(0)
        return Answered(reply("x"), is_final=True)

    key = Key(0, 1, b"a")
    await asyncio.gather(*(duplicates.answer(key, run) for _ in range(3)))
    assert runs["run"] == 3
    assert len(duplicates) == 0


async def test_an_answer_too_large_to_keep_still_answers_who_waits() -> None:
    copies = Counter[str]()
    duplicates = Duplicates(60, max_bytes=100, on_copy=lambda: copies.update(["copy"]))
    runs = Counter[str]()

    async def run() -> Answered:
        runs["run"] += 1
        await asyncio.sleep(0)
        return Answered(reply("x" * 500), is_final=True)

    key = Key(0, 1, b"a")
    answers = await asyncio.gather(*(duplicates.answer(key, run) for _ in range(3)))
    assert answers == [reply("x" * 500)] * 3
    assert (runs["run"], copies["copy"]) == (1, 2)
    assert (len(duplicates), duplicates.used_bytes) == (0, 0)
    await duplicates.answer(key, run)
    assert runs["run"] == 2


async def test_what_a_run_raises_reaches_its_own_caller_only() -> None:
    duplicates = Duplicates(60)
    runs = Counter[str]()

    async def run() -> Answered:
        runs["run"] += 1
        number = runs["run"]
        await asyncio.sleep(0)
        if number == 1:
            raise RuntimeError("a bug")
        return Answered(reply("well"), is_final=True)

    key = Key(0, 1, b"a")
    first, second = (asyncio.create_task(duplicates.answer(key, run)) for _ in range(2))
    with pytest.raises(RuntimeError, match="a bug"):
        await first
    assert await second == reply("well")
    assert runs["run"] == 2


@dataclass(eq=False)
class Run:
    """One call of `run` that has not ended."""

    key: Key
    number: int
    ending: asyncio.Future[Answered]


@dataclass(eq=False)
class Message:
    """One message that wants an answer."""

    key: Key
    task: asyncio.Task[OutgoingRecord]
    cancelled: bool = False
    runs: list[Run] = field(default_factory=list)


WINDOW = 10.0


class Arrivals(RuleBasedStateMachine):
    """Messages with few keys arrive, runs end in each way, tasks are cancelled, time passes."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.now = 0.0
        self.duplicates = Duplicates(WINDOW, max_bytes=4 * (OVERHEAD + 8), max_answers=3, clock=lambda: self.now)
        self.messages: list[Message] = []
        self.running: list[Run] = []
        self.number = 0
        self.final: dict[Key, dict[OutgoingRecord, float]] = {}  # every final answer, with its time

    def settle(self) -> None:
        async def turns() -> None:
            for _ in range(12):
                await asyncio.sleep(0)

        self.loop.run_until_complete(turns())

    @rule(partition=st.integers(0, 1), epoch=st.integers(1, 2), digest=st.sampled_from([b"a", b"b"]))
    def arrive(self, partition: int, epoch: int, digest: bytes) -> None:
        key = Key(partition, epoch, digest)

        async def run() -> Answered:
            self.number += 1
            mine = Run(key, self.number, self.loop.create_future())
            message.runs.append(mine)
            self.running.append(mine)
            try:
                return await mine.ending
            finally:
                self.running.remove(mine)

        message = Message(key, self.loop.create_task(self.duplicates.answer(key, run)))
        self.messages.append(message)
        self.settle()

    @precondition(lambda self: self.running)
    @rule(data=st.data(), is_final=st.booleans(), size=st.integers(0, 3000))
    def end(self, data: st.DataObject, is_final: bool, size: int) -> None:
        run = data.draw(st.sampled_from(self.running))
        answer = OutgoingRecord("replies", b"%d" % run.number, b"x" * size)
        if is_final:
            self.final.setdefault(run.key, {})[answer] = self.now
        run.ending.set_result(Answered(answer, is_final))
        self.settle()

    @precondition(lambda self: any(not m.task.done() for m in self.messages))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        message = data.draw(st.sampled_from([m for m in self.messages if not m.task.done()]))
        message.cancelled = True
        message.task.cancel()
        self.settle()

    @rule(seconds=st.floats(0, 6))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def one_runs_and_the_rest_wait(self) -> None:
        by_key = Counter(run.key for run in self.running)
        assert all(count == 1 for count in by_key.values())
        waiting = {m.key for m in self.messages if not m.task.done()}
        assert waiting == set(by_key), "whoever waits has somebody to wait for"

    @invariant()
    def answers_are_their_own(self) -> None:
        for message in [m for m in self.messages if m.task.done()]:
            self.messages.remove(message)
            if message.cancelled:
                assert message.task.cancelled()
                continue
            answer = message.task.result()
            if message.runs:
                assert answer.key == b"%d" % message.runs[-1].number, "who ran is answered by its own run"
            else:
                ended = self.final[message.key][answer]  # a final answer to an equal message of this owner
                assert self.now - ended < WINDOW

    @invariant()
    def memory_is_bounded(self) -> None:
        assert len(self.duplicates) <= 3
        assert self.duplicates.used_bytes <= 4 * (OVERHEAD + 8)
        assert len(self.duplicates) > 0 or self.duplicates.used_bytes == 0

    def teardown(self) -> None:
        for message in self.messages:
            message.task.cancel()
        self.settle()
        self.loop.close()


TestArrivals = Arrivals.TestCase
TestArrivals.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
