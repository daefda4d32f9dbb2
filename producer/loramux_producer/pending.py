"""Requests that wait for their reply, found again by the correlation header. Knows no Kafka."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from loramux_producer.errors import ClientError, ReplyFailed, ReplyTimeout
from loramux_schemas import Reply, Request, StreamDelta
from loramux_schemas.headers import CORRELATION_ID

OnDelta = Callable[[StreamDelta], None]
OnUnclaimed = Callable[[bytes, bytes | None], None]


@dataclass(frozen=True, slots=True, eq=False)
class PendingReply:
    """One request on its way. `future` gets the reply, or the reason why there is none."""

    correlation_id: bytes
    request: Request
    future: asyncio.Future[Reply]
    on_delta: OnDelta | None


class PendingReplies:
    """All requests of one client that wait.

    A correlation id is the client's own random id, a running number and the request_id: it is unique even
    where two requests carry one request_id, and what belongs to other clients is passed over without being
    parsed. `on_unclaimed` is given the correlation id and the value of replies that no request waits for.
    """

    def __init__(self) -> None:
        self.on_unclaimed: OnUnclaimed | None = None
        self._client = secrets.token_hex(8)
        self._number = 0
        self._waiting: dict[bytes, PendingReply] = {}

    def __len__(self) -> int:
        return len(self._waiting)

    def open(
        self,
        request: Request,
        timeout: float,
        on_delta: OnDelta | None = None,
        correlation_id: bytes | None = None,
    ) -> PendingReply:
        """Wait for the reply to `request` for `timeout` seconds (`math.inf`: as long as it takes).

        Raises `ValueError` for a `correlation_id` under which another request waits.
        """
        timeout = valid_timeout(timeout)
        if correlation_id is None:
            self._number += 1
            correlation_id = f"{self._client}/{self._number}/{request.request_id}".encode()
        elif correlation_id in self._waiting:
            raise ValueError(f"correlation_id: another request waits under {correlation_id!r}")
        loop = asyncio.get_running_loop()
        pending = PendingReply(correlation_id, request, loop.create_future(), on_delta)
        self._waiting[correlation_id] = pending
        pending.future.add_done_callback(lambda _: self._waiting.pop(correlation_id, None))
        if timeout < math.inf:
            timer = loop.call_later(timeout, _expire, pending, timeout)
            pending.future.add_done_callback(lambda _: timer.cancel())
        return pending

    def take_reply(self, headers: Sequence[tuple[str, bytes]], value: bytes | None) -> None:
        """A record of the replies topic: settles the request it answers.

        What no request waits for is somebody else's, a second reply or a late one.
        """
        correlation_id = _correlation_id(headers)
        if correlation_id is None:
            return
        pending = self._waiting.get(correlation_id)
        if pending is None or pending.future.done():
            if self.on_unclaimed is not None:
                self.on_unclaimed(correlation_id, value)
            return
        try:
            reply = Reply.from_json(value or b"")
        except ValueError as error:
            reason = " ".join(str(error).split())
            pending.future.set_exception(
                ClientError(f"request {pending.request.request_id}: unreadable reply: {reason}")
            )
            return
        if reply.error is not None:
            pending.future.set_exception(ReplyFailed(reply))
        else:
            pending.future.set_result(reply)

    def take_delta(self, headers: Sequence[tuple[str, bytes]], value: bytes | None) -> None:
        """A record of the stream topic: handed to the request it belongs to, if that is one of ours."""
        correlation_id = _correlation_id(headers)
        pending = None if correlation_id is None else self._waiting.get(correlation_id)
        if pending is None or pending.on_delta is None or pending.future.done():
            return
        try:
            delta = StreamDelta.from_json(value or b"")
        except ValueError as error:
            reason = " ".join(str(error).split())
            pending.future.set_exception(
                ClientError(f"request {pending.request.request_id}: unreadable delta: {reason}")
            )
            return
        pending.on_delta(delta)

    def fail_all(self, error: Callable[[str], ClientError], cause: BaseException | None = None) -> None:
        """Every request that waits fails with `error(request_id)`, raised from `cause`."""
        for pending in list(self._waiting.values()):
            if not pending.future.done():
                exception = error(pending.request.request_id)
                exception.__cause__ = cause
                pending.future.set_exception(exception)
                # Nobody may be awaiting it any more; that is no reason for asyncio to complain.
                pending.future.exception()


def _correlation_id(headers: Sequence[tuple[str, bytes]]) -> bytes | None:
    return next((value for name, value in headers if name == CORRELATION_ID), None)


def valid_timeout(seconds: float) -> float:
    """`seconds`, if requests can wait that long; raises `ValueError` otherwise."""
    if not seconds > 0:
        raise ValueError(f"timeout: {seconds} is not a positive number of seconds")
    return seconds


def _expire(pending: PendingReply, timeout: float) -> None:
    if not pending.future.done():
        pending.future.set_exception(
            ReplyTimeout(f"request {pending.request.request_id}: no reply within {timeout:g} s")
        )
