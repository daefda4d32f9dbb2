"""The front between Kafka and the answers: what is parked, what starts when, and what becomes of parked requests."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from dataclasses import replace

from loramux_worker.cancellations import Cancellations
from loramux_worker.front import Front
from loramux_worker.kafka.records import OutgoingRecord, Record
from loramux_worker.look_ahead import MOST_AT_ONCE, Window
from loramux_worker.stopwatch import Stopwatch

SEATS = 10


class Backlog:
    """Records in Kafka's order, from one partition, and what became of each."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.given = 0
        self.more = asyncio.Event()

    def add(self, name: str, adapter_id: str, **fields: object) -> None:
        value = json.dumps({"request_id": name, "adapter_id": adapter_id, "prompt": "x", **fields}).encode()
        self.records.append(Record("requests", 0, len(self.records), None, value, (), 0, epoch=1))
        self.more.set()

    async def take(self, max_records: int, timeout: float, besides: Collection[int] = ()) -> list[Record]:
        taken = [] if 0 in besides else self.records[self.given : self.given + max_records]
        self.given += len(taken)
        if not taken:
            self.more.clear()
            await asyncio.wait([asyncio.create_task(self.more.wait())], timeout=timeout)
        return taken


class Stage:
    """A front whose requests run until they are let go, and which says what it was asked to do."""

    def __init__(self, max_parked: int = 1000) -> None:
        self.backlog = Backlog()
        self.cancellations = Cancellations(60.0)
        self.running: dict[str, asyncio.Event] = {}
        self.answered: list[str] = []
        window = Window(SEATS, 0.75, max_parked, 1 << 20)
        self.front = Front(self.backlog, self.run, None, self, self, window, self.cancellations)  # type: ignore[arg-type]

    async def run(self, record: Record, watch: Stopwatch) -> tuple[OutgoingRecord, ...]:
        """As an answerer: late and cancelled ones end at once."""
        request = json.loads(record.value or b"")
        name = request["request_id"]
        if name not in self.cancellations and request.get("deadline_ms", 1e15) > time.time() * 1000:
            self.running[name] = asyncio.Event()
            try:
                await self.running[name].wait()
            finally:
                del self.running[name]
        self.answered.append(name)
        return ()

    async def complete(self, record: Record, outgoing: object) -> None: ...

    async def until(self, *running: str, parked: int) -> None:
        """Wait until these run and so many are parked."""
        await until(lambda: set(running) == set(self.running) and parked == self.front.parked)


@asynccontextmanager
async def stage(max_parked: int = 1000) -> AsyncIterator[Stage]:
    made = Stage(max_parked)
    taking = asyncio.create_task(made.front.take_requests())
    try:
        yield made
    finally:
        await made.front.drain(0.0)
        await taking
    assert made.front.in_flight == made.front.parked == 0
    assert not made.cancellations._scopes, "nothing is watched any more"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is asked for is many things' doing
            await asyncio.sleep(0.001)


def flood(stage: Stage, count: int) -> list[str]:
    """Names of that many requests of one adapter."""
    names = [f"flood-{i}" for i in range(count)]
    for name in names:
        stage.backlog.add(name, "flood")
    return names


async def test_requests_behind_a_flood_start_before_it_is_over() -> None:
    async with stage() as s:
        names = flood(s, 30)
        s.backlog.add("light", "light")
        await s.until(*names[:7], "light", parked=23)
        s.running["light"].set()
        s.running[names[3]].set()
        await s.until(*(name for name in names[:9] if name != names[3]), parked=21)
        assert set(s.answered) == {"light", names[3]}


async def test_a_flood_is_begun_a_request_a_turn_so_that_others_are_heard_between() -> None:
    async with stage() as s:
        names = flood(s, 7)
        begun = []
        async with asyncio.timeout(10):
            while len(s.running) < len(names):
                begun.append(len(s.running))
                await asyncio.sleep(0)
        assert sorted(set(begun)) == list(range(len(names)))


async def test_records_that_are_there_already_leave_the_others_their_turns() -> None:
    async with stage(max_parked=4 * MOST_AT_ONCE) as s:
        flood(s, 3 * MOST_AT_ONCE)
        read = []
        async with asyncio.timeout(10):
            while s.backlog.given < len(s.backlog.records):
                await asyncio.sleep(0)
                read.append(s.backlog.given)
        assert set(read) >= {MOST_AT_ONCE, 2 * MOST_AT_ONCE}


async def test_everything_is_answered_in_the_end_with_hardly_any_room_to_park() -> None:
    async with stage(max_parked=1) as s:
        names = flood(s, 50)
        async with asyncio.timeout(20):
            while len(s.answered) < 50:
                for event in s.running.values():
                    event.set()
                await asyncio.sleep(0.001)
        assert s.answered == names


async def test_a_parked_request_that_is_cancelled_is_answered_at_once() -> None:
    async with stage() as s:
        names = flood(s, 20)
        await s.until(*names[:8], parked=12)
        s.cancellations.cancel(names[15], time.time())
        await s.until(*names[:8], parked=11)
        s.cancellations.cancel("later", time.time())
        s.backlog.add("later", "flood")
        await until(lambda: len(s.answered) == 2)
        assert s.answered == [names[15], "later"]
        assert s.front.parked == 11


async def test_a_parked_request_is_answered_when_its_deadline_passes() -> None:
    async with stage() as s:
        names = flood(s, 9)
        deadline = time.time() + 1.5  # of a busy machine
        s.backlog.add("late", "flood", deadline_ms=int(deadline * 1000))
        s.backlog.add("over", "flood", deadline_ms=1)
        s.backlog.add("patient", "flood", deadline_ms=2**62)
        await s.until(*names[:8], parked=3)
        assert s.answered == ["over"]
        await s.until(*names[:8], parked=2)
        await until(lambda: s.answered == ["over", "late"])
        assert time.time() > deadline - 0.05


async def test_parked_requests_of_a_lost_partition_are_dropped() -> None:
    async with stage() as s:
        names = flood(s, 20)
        await s.until(*names[:8], parked=12)
        s.backlog.records.append(replace(s.backlog.records[0], value=b"{}", epoch=2))
        s.front.lose({(0, 1)})
        assert s.front.parked == 0
        assert s.answered == []
        await until(lambda: s.front.in_flight == 0)


async def test_a_drain_gives_up_what_is_parked_and_finishes_what_runs() -> None:
    async with stage() as s:
        names = flood(s, 20)
        await s.until(*names[:8], parked=12)
        draining = asyncio.create_task(s.front.drain(5.0))
        await s.until(*names[:8], parked=0)
        for event in s.running.values():
            event.set()
        await draining
        assert s.answered == names[:8]
