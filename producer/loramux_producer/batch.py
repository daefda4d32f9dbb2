"""A file of requests through Kafka: bounded concurrency, a journal of what was answered, ordered output."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Final

import orjson

from loramux_producer.client import Client
from loramux_producer.errors import InputError, ReplyFailed, ReplyTimeout, RequestTooLarge, Unanswered
from loramux_producer.ids import new_request_id
from loramux_producer.journal import Journal
from loramux_schemas import ErrorCode, InvalidRequest, Reply, Request, UnparseableMessage

MAX_REPORTED_LINES: Final = 10
FIRST_PAUSE_SECONDS: Final = 0.5
LONGEST_PAUSE_SECONDS: Final = 30.0


@dataclass(frozen=True, slots=True)
class BatchInput:
    """A file of requests, one JSON object a line, its `request_id` optional; blank lines are passed over."""

    path: Path
    digest: str
    num_requests: int

    @classmethod
    def check(cls, path: Path) -> BatchInput:
        """Read the whole file; raises InputError if a line is no valid request, and OSError."""
        digest = blake2b(digest_size=16)
        num_requests = 0
        wrong: list[str] = []
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                digest.update(line)
                if line.isspace():
                    continue
                num_requests += 1
                try:
                    parse_line(line)
                except ValueError as error:
                    wrong.append(f"{path}, line {number}: {error}")
        if wrong:
            more = len(wrong) - MAX_REPORTED_LINES
            raise InputError("\n".join(wrong[:MAX_REPORTED_LINES] + [f"… and {more} more"] * (more > 0)))
        return cls(path, digest.hexdigest(), num_requests)

    def requests(self, batch_id: str) -> Iterator[tuple[int, Request]]:
        """Line number, from 1, and request of each line that holds one; the same whenever it is read for a batch.

        An id that a line has not is made of the UUID `batch_id` and its number (RFC 9562, version 5).
        """
        namespace = uuid.UUID(batch_id)
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    yield number, parse_line(line, str(uuid.uuid5(namespace, str(number))))


def parse_line(line: bytes, request_id: str | None = None) -> Request:
    """The request of one line, if it has no id with this or a new one; raises `ValueError` in one line."""
    try:
        payload = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(payload, dict):
        raise ValueError("not a JSON object")
    if payload.get("request_id") is None:
        payload["request_id"] = request_id or new_request_id()
    try:
        return Request.from_json(orjson.dumps(payload))
    except (InvalidRequest, UnparseableMessage) as error:
        raise ValueError(str(error)) from None


class Batch:
    """Asks what the journal does not hold yet, `concurrency` requests at a time.

    Make it before its client starts. What an earlier run asked and never read is taken from the replies topic
    first; what is asked again then is word for word what was asked before.

    A retryable error reply is asked again, up to `retries` times with growing pauses. `timeout` is the
    seconds that one request may wait. `on_answer` is called with each reply that has been written to the
    journal.
    """

    def __init__(
        self,
        client: Client,
        journal: Journal,
        *,
        concurrency: int = 256,
        retries: int = 3,
        timeout: float = 600.0,
        on_answer: Callable[[Reply], None] = lambda reply: None,
    ) -> None:
        self.client = client
        self.journal = journal
        self._concurrency = concurrency
        self._retries = retries
        self._timeout = timeout
        self._on_answer = on_answer
        self._num_answers = 0
        self._timed_out: set[int] = set()
        self._nobody_answers = False
        client.resume(journal.positions(client.replies_topic), self._take_unclaimed)

    async def run(self, source: BatchInput) -> None:
        """Ask until every line is answered.

        Raises Unanswered if some request was not answered in time: those behind it are asked all the same,
        unless nobody was answered during that time. Raises ClientError where Kafka fails.
        """
        await self.client.caught_up()
        self.journal.stand_at(self.client.replies_topic, self.client.reply_positions)
        requests = source.requests(self.journal.batch_id)
        waiting = ((line, request) for line, request in requests if line not in self.journal)
        num_lanes = min(self._concurrency, source.num_requests)
        lanes = [asyncio.create_task(self._lane(waiting)) for _ in range(num_lanes)]
        try:
            await asyncio.gather(*lanes)
        finally:
            for lane in lanes:
                lane.cancel()
            await asyncio.gather(*lanes, return_exceptions=True)
        unanswered = sum(line not in self.journal for line in self._timed_out)
        if unanswered:
            raise Unanswered(f"requests without a reply within {self._timeout:g} s: {unanswered}")

    async def _lane(self, waiting: Iterator[tuple[int, Request]]) -> None:
        for line, request in waiting:
            if self._nobody_answers:
                return
            answers_before = self._num_answers
            try:
                await self._answer(line, request)
            except ReplyTimeout:
                self._timed_out.add(line)
                self._nobody_answers = self._num_answers == answers_before

    async def _answer(self, line: int, request: Request) -> None:
        pause = FIRST_PAUSE_SECONDS
        for retries_left in range(self._retries, -1, -1):
            reply = await self._ask(line, request)
            if reply.error is None or not reply.error.retryable or not retries_left:
                self._record(line, reply)
                return
            await asyncio.sleep(pause)
            if line in self.journal:
                return
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)

    async def _ask(self, line: int, request: Request) -> Reply:
        try:
            future = await self.client.submit_request(
                request, timeout=self._timeout, correlation_id=f"{self.journal.batch_id}/{line}".encode()
            )
        except RequestTooLarge as error:
            return Reply.failure(
                ErrorCode.INVALID_REQUEST,
                str(error),
                request_id=request.request_id,
                adapter_id=None if request.adapter is None else request.adapter.adapter_id,
                metadata=request.metadata,
            )
        try:
            return await future
        except ReplyFailed as failed:
            return failed.reply
        except asyncio.CancelledError:
            # Interrupted after the reply came and before this task had its turn: it is not asked for again.
            if not future.cancelled() and future.exception() is None:
                self._record(line, future.result())
            raise

    def _take_unclaimed(self, correlation_id: bytes, value: bytes | None) -> None:
        """A reply that no request waits for: of an earlier run, or too late; what may be asked again is passed over."""
        batch_id, _, line = correlation_id.partition(b"/")
        if batch_id != self.journal.batch_id.encode() or not line.isdigit():
            return
        with contextlib.suppress(ValueError):
            reply = Reply.from_json(value or b"")
            if reply.error is None or not reply.error.retryable:
                self._record(int(line), reply)

    def _record(self, line: int, reply: Reply) -> None:
        if line in self.journal:
            return
        self.journal.append(line, reply)
        self._num_answers += 1
        self._on_answer(reply)
