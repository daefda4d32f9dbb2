"""One message sent twice is answered once and copied: by whom it is asked again is no matter of the engine's.

    answer = await duplicates.answer(key, run)     # `run` unless an equal message is being run or just was

A message is known by its bytes and by the stretch of time in which its partition is ours: (partition, epoch). What
two owners of a partition do is not for memory to decide, and the request_id alone does not say what was asked.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Final, NamedTuple

from loramux_worker.kafka.records import OutgoingRecord, Record

MAX_BYTES: Final = 64 << 20
MAX_ANSWERS: Final = 100_000
OVERHEAD: Final = 512  # bytes that an answer takes beside its value


class Key(NamedTuple):
    """What makes two messages the same one."""

    partition: int
    epoch: int
    digest: bytes

    @classmethod
    def of(cls, record: Record) -> Key:
        """The key of a record that holds a request; its request_id is part of its value."""
        return cls(record.partition, record.epoch, blake2b(record.value or b"", digest_size=16).digest())


@dataclass(frozen=True, slots=True)
class Answered:
    """What became of a request. `is_final`: the same request, run again, would fare no better."""

    reply: OutgoingRecord
    is_final: bool


@dataclass(frozen=True, slots=True)
class _Kept:
    reply: OutgoingRecord
    until: float

    @property
    def size(self) -> int:
        return len(self.reply.value or b"") + OVERHEAD


class Duplicates:
    """Answers that are kept for `window` seconds, within `max_bytes` and `max_answers`, the oldest out first.

    While a message runs, equal ones wait for it. One that ended without a final answer leaves them to run: the
    next of them does, and the rest wait again. A window of 0 keeps and joins nothing. `on_copy` is called for each
    message that was not run. Belongs to one event loop.
    """

    def __init__(
        self,
        window: float,
        *,
        max_bytes: int = MAX_BYTES,
        max_answers: int = MAX_ANSWERS,
        clock: Callable[[], float] = time.monotonic,
        on_copy: Callable[[], None] = lambda: None,
    ) -> None:
        self.used_bytes = 0
        self._window = window
        self._max_bytes = max_bytes
        self._max_answers = max_answers
        self._clock = clock
        self._on_copy = on_copy
        self._kept: OrderedDict[Key, _Kept] = OrderedDict()  # in the order in which they expire
        self._running: dict[Key, asyncio.Future[OutgoingRecord | None]] = {}

    def __len__(self) -> int:
        """Answers that are kept."""
        return len(self._kept)

    async def answer(self, key: Key, run: Callable[[], Awaitable[Answered]]) -> OutgoingRecord:
        """What `run` answers, or what it answered to an equal message. Raises what `run` raises."""
        if not self._window:
            return (await run()).reply
        while (reply := self._recall(key)) is None:
            first = self._running.get(key)
            if first is None:
                return await self._run(key, run)
            await asyncio.wait([first])  # not `await first`: whoever is cancelled here cancels only itself
            if (reply := first.result()) is not None:
                break
        self._on_copy()
        return reply

    async def _run(self, key: Key, run: Callable[[], Awaitable[Answered]]) -> OutgoingRecord:
        outcome = self._running[key] = asyncio.get_running_loop().create_future()
        answered = None
        try:
            answered = await run()
        finally:
            del self._running[key]
            outcome.set_result(answered.reply if answered is not None and answered.is_final else None)
        if answered.is_final:
            self._keep(key, answered.reply)
        return answered.reply

    def _recall(self, key: Key) -> OutgoingRecord | None:
        self._forget(self._clock())
        kept = self._kept.get(key)
        return None if kept is None else kept.reply

    def _keep(self, key: Key, reply: OutgoingRecord) -> None:
        now = self._clock()
        kept = self._kept[key] = _Kept(reply, now + self._window)
        self.used_bytes += kept.size
        self._forget(now)

    def _forget(self, now: float) -> None:
        while self._kept:
            oldest = next(iter(self._kept.values()))
            fits = self.used_bytes <= self._max_bytes and len(self._kept) <= self._max_answers
            if fits and oldest.until > now:
                return
            self._kept.popitem(last=False)
            self.used_bytes -= oldest.size
