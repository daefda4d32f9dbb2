"""A client for a batch, without Kafka and workers."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

from loramux_producer import ClientError, ReplyFailed, ReplyTimeout, RequestTooLarge
from loramux_schemas import ErrorCode, Reply, Request


def ok(request_id: str) -> Reply:
    return Reply(request_id=request_id, generated_text=f"answer to {request_id}", token_ids=(1, 2))


def failed(request_id: str, code: ErrorCode = ErrorCode.INTERNAL) -> Reply:
    return Reply.failure(code, "as asked", request_id=request_id)


class Standing:
    """Where a client stands in the replies topic: at its end, or where it is told to resume."""

    replies_topic = "replies"

    def __init__(self) -> None:
        self.resumed_at: dict[int, int] | None = None
        self.reply_positions = {0: 7, 1: 0}
        self.missed: list[tuple[bytes, bytes]] = []

    def resume(self, positions: dict[int, int] | None, on_unclaimed: Callable[[bytes, bytes | None], None]) -> None:
        self.resumed_at = positions
        self.take_unclaimed = on_unclaimed

    async def caught_up(self) -> None:
        for correlation_id, value in self.missed:
            self.take_unclaimed(correlation_id, value)


class FakeClient(Standing):
    """Answers as the request's metadata says; a stand-in for Kafka and a worker, not for what is tested here."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[str] = Counter()
        self.correlation_ids: set[bytes] = set()
        self.now = self.most = 0
        self.full = asyncio.Event()
        self.late: list[asyncio.Future[Reply]] = []
        self.hold = asyncio.Event()
        self.hold.set()

    async def submit_request(self, request: Request, *, timeout: float, correlation_id: bytes) -> asyncio.Future[Reply]:
        self.asked[request.request_id] += 1
        self.correlation_ids.add(correlation_id)
        self.now += 1
        self.most = max(self.most, self.now)
        if self.now == 8:
            self.full.set()
        await self.hold.wait()
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self.now -= 1
        match (request.metadata or {}).get("answer", "ok"):
            case "ok":
                future.set_result(ok(request.request_id))
            case "late":
                self.late.append(future)
            case "large":
                raise RequestTooLarge("a request of 9 bytes is too large")
            case "broken":
                raise ClientError("reading ended")
            case "second time":
                reply = failed(request.request_id)
                if self.asked[request.request_id] < 2:
                    future.set_exception(ReplyFailed(reply))
                else:
                    future.set_result(ok(request.request_id))
            case code:
                future.set_exception(ReplyFailed(failed(request.request_id, ErrorCode(code))))
        # A timeout is longer than it takes to answer others.
        if self.asked.total() >= 10:
            for late in self.late:
                late.set_exception(ReplyTimeout("no reply"))
            self.late.clear()
        return future
