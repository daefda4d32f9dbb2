"""Deltas of a stream: the first at once, the others at a pace, the end never late, and every token in one of them."""

from __future__ import annotations

import asyncio
import itertools
import time

import pytest

from loramux_schemas import ErrorCode, ReplyRoute, Request, StreamDelta
from loramux_worker import deltas
from loramux_worker.deltas import DeltaStream
from loramux_worker.engine.protocol import SamplingParameters, SequenceOutput, Submit
from loramux_worker.errors import RequestFailed
from loramux_worker.generation import Generation
from loramux_worker.kafka.records import OutgoingRecord

A_LONG_TIME = 60.0


class Follower:
    """Reads a generation as the worker does, each token a letter, and notes what it posts and when."""

    def __init__(self) -> None:
        self.generation = Generation(Submit(1, [1], SamplingParameters(max_new_tokens=100), None))
        self.posted: list[tuple[float, StreamDelta]] = []
        request = Request(request_id="r", prompt="x", stream=True)
        self._stream = DeltaStream(request, ReplyRoute.unrouted(()), "stream", self._post)
        self.task = asyncio.create_task(self._follow())

    def token(self, token_id: int, reason: str | None = None) -> None:
        self.generation.add(SequenceOutput(1, token_id, reason, None))

    @property
    def tokens(self) -> list[tuple[int, ...]]:
        return [delta.token_ids for _, delta in self.posted]

    async def _post(self, record: OutgoingRecord) -> None:
        self.posted.append((time.monotonic(), StreamDelta.from_json(record.value or b"")))

    async def _follow(self) -> None:
        count = 0
        while not (self.generation.is_done and count == len(self.generation.token_ids)):
            await self.generation.wait_beyond(count, self._stream.rest)
            for token_id in self.generation.token_ids[count:]:
                count += 1
                self._stream.push(token_id, chr(64 + token_id))
            if not self.generation.is_done:
                await self._stream.send()
        await self._stream.finish("")


async def turns() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_the_first_goes_at_once_and_the_end_with_all_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deltas, "PACE_SECONDS", A_LONG_TIME)
    follower = Follower()
    await turns()
    follower.token(1)
    await turns()
    assert follower.tokens == [(1,)]
    for token_id in (2, 3, 4):
        follower.token(token_id)
        await turns()
    assert follower.tokens == [(1,)], "it is not time yet"
    follower.token(5, "length")
    await asyncio.wait_for(follower.task, 1.0)
    assert follower.tokens == [(1,), (2, 3, 4, 5)]
    assert "".join(delta.text for _, delta in follower.posted) == "ABCDE"
    assert [delta.index for _, delta in follower.posted] == [0, 1]


async def test_deltas_keep_their_distance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deltas, "PACE_SECONDS", 0.03)
    follower = Follower()
    for token_id in range(1, 20):
        follower.token(token_id)
        await asyncio.sleep(0.005)
    follower.token(20, "length")
    await asyncio.wait_for(follower.task, 1.0)
    assert [token for tokens in follower.tokens for token in tokens] == list(range(1, 21))
    times = [at for at, _ in follower.posted[:-1]]  # the last does not wait
    assert len(times) > 1
    assert all(after - before >= 0.03 for before, after in itertools.pairwise(times))


async def test_a_token_after_the_pause_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deltas, "PACE_SECONDS", 0.01)
    follower = Follower()
    follower.token(1)
    await asyncio.sleep(0.05)
    follower.token(2)
    await turns()
    assert follower.tokens == [(1,), (2,)]
    follower.task.cancel()


async def test_a_failure_is_heard_during_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deltas, "PACE_SECONDS", A_LONG_TIME)
    follower = Follower()
    follower.token(1)
    await turns()
    follower.generation.fail(RequestFailed(ErrorCode.INTERNAL, "gone"))
    with pytest.raises(RequestFailed, match="gone"):
        await asyncio.wait_for(follower.task, 1.0)
