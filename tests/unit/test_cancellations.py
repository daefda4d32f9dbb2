"""Who is to be stopped: remembered within bounds, told to whoever runs, and never to anybody else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loramux_schemas import Cancellation, ErrorCode, UnparseableMessage
from loramux_worker.cancellations import Cancellations
from loramux_worker.errors import RequestFailed

NOW = 1_000_000.0


class Clock:
    def __init__(self) -> None:
        self.now = NOW

    def __call__(self) -> float:
        return self.now


async def work(cancellations: Cancellations, request_id: str, body: Callable[[], Awaitable[str]]) -> str:
    """What an answerer does: the work, or the code of its failure."""
    try:
        with cancellations.scope(request_id):
            return await body()
    except RequestFailed as failed:
        return failed.code


async def for_ever() -> str:
    await asyncio.Event().wait()
    return "never"


async def started(*bodies: Awaitable[str]) -> list[asyncio.Task[str]]:
    tasks = [asyncio.ensure_future(body) for body in bodies]
    await asyncio.sleep(0)
    return tasks


async def test_who_runs_is_stopped_and_nobody_else() -> None:
    cancellations = Cancellations(60, clock=Clock())
    first, second, other = await started(
        work(cancellations, "a", for_ever), work(cancellations, "a", for_ever), work(cancellations, "b", for_ever)
    )
    cancellations.cancel("a", NOW)
    cancellations.cancel("a", NOW)  # read twice, as after an outage
    assert await first == await second == ErrorCode.CANCELLED
    await asyncio.sleep(0)
    assert not other.done()
    other.cancel()
    assert first.cancelling() == 0


async def test_who_comes_later_is_stopped_before_it_begins() -> None:
    clock = Clock()
    cancellations = Cancellations(60, clock=clock)
    cancellations.cancel("a", NOW)
    begun: list[str] = []

    async def body() -> str:
        begun.append("a")
        return "ran"

    assert await work(cancellations, "a", body) == ErrorCode.CANCELLED
    assert not begun
    clock.now += 60
    assert await work(cancellations, "a", body) == "ran"


async def test_who_is_answered_stays_answered() -> None:
    cancellations = Cancellations(60, clock=Clock())

    async def body() -> str:
        return "answered"

    assert await work(cancellations, "a", body) == "answered"
    cancellations.cancel("a", NOW)
    await asyncio.sleep(0)
    assert asyncio.current_task().cancelling() == 0  # type: ignore[union-attr]


async def test_the_cancellation_of_the_task_itself_passes_through() -> None:
    cancellations = Cancellations(60, clock=Clock())
    (plain,) = await started(work(cancellations, "a", for_ever))
    plain.cancel()
    with pytest.raises(asyncio.CancelledError):
        await plain
    (both,) = await started(work(cancellations, "b", for_ever))
    cancellations.cancel("b", NOW)
    both.cancel()
    with pytest.raises(asyncio.CancelledError):
        await both


async def test_a_deadline_inside_does_not_swallow_it() -> None:
    cancellations = Cancellations(60, clock=Clock())

    async def with_deadline() -> str:
        async with asyncio.timeout(3600):
            return await for_ever()

    (task,) = await started(work(cancellations, "a", with_deadline))
    cancellations.cancel("a", NOW)
    assert await task == ErrorCode.CANCELLED


def test_an_old_cancellation_is_nobodys() -> None:
    cancellations = Cancellations(60, clock=Clock())
    cancellations.cancel("old", NOW - 60)
    assert "old" not in cancellations
    assert len(cancellations) == 0
    cancellations.cancel("future", NOW + 3600)  # a clock that is ahead keeps nothing for longer
    cancellations.cancel("older again", NOW)
    cancellations.cancel("older again", NOW - 59)
    assert "older again" in cancellations


@given(
    st.lists(
        st.tuples(st.sampled_from("abcdefgh"), st.floats(0, 30), st.integers(-20, 5)),
        max_size=60,
    )
)
def test_what_is_remembered_is_what_is_young_and_bounded(events: list[tuple[str, float, int]]) -> None:
    clock = Clock()
    cancellations = Cancellations(10, max_remembered=4, clock=clock)
    expiries: dict[str, float] = {}
    for request_id, passed, age in events:
        clock.now += passed
        cancellations.cancel(request_id, clock.now + age)
        expiries[request_id] = max(expiries.get(request_id, 0.0), min(clock.now + age, clock.now) + 10)
        assert len(cancellations) <= 4
        for each in "abcdefgh":
            if each in cancellations:
                assert expiries[each] > clock.now
        assert (request_id in cancellations) == (expiries[request_id] > clock.now)
    young = [each for each, expiry in expiries.items() if expiry > clock.now]
    if len(expiries) <= 4:
        assert all(each in cancellations for each in young)


@given(st.binary(max_size=60))
def test_whatever_the_bytes_reading_raises_one_error(value: bytes) -> None:
    with contextlib.suppress(UnparseableMessage):
        cancellation = Cancellation.from_json(value)
        assert Cancellation.from_json(cancellation.to_json()) == cancellation


@pytest.mark.parametrize("request_id", ["", "x" * 257, "half \ud800"])
def test_what_is_no_request_id_cannot_be_cancelled(request_id: str) -> None:
    with pytest.raises(ValueError, match="request_id: "):
        Cancellation.of(request_id)
