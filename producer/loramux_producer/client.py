"""The client: produces requests, reads replies, and brings the two together."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, Unpack

from loramux_producer.canceller import Canceller
from loramux_producer.connection import DEFAULT_SERVERS, connecting, kafka_connection
from loramux_producer.errors import ClientClosed, ClientError
from loramux_producer.partitions import PartitionChooser
from loramux_producer.pending import OnDelta, OnUnclaimed, PendingReplies, PendingReply, valid_timeout
from loramux_producer.requests import RequestFields, build_request
from loramux_producer.sender import RequestSender
from loramux_producer.stream import ReplyStream
from loramux_producer.tail import TopicTail
from loramux_schemas import (
    CONTROL_TOPIC,
    REPLIES_TOPIC,
    REQUESTS_TOPIC,
    STREAM_TOPIC,
    Cancellation,
    Headers,
    KafkaConnection,
    Reply,
    Request,
)
from loramux_schemas.headers import CORRELATION_ID, REPLY_TO


class Client:
    """Asks loramux workers through Kafka.

        async with Client("localhost:9092") as client:
            reply = await client.generate("Hello", adapter_id="acme/support", max_new_tokens=32)

    One client serves any number of concurrent requests of one event loop. It reads the replies topic from its end on,
    without a consumer group, so any number share the topics. It outlives its brokers; how to outlive it, see `resume`.

    `timeout`: seconds from asking to the final reply, where a call names none; `math.inf` waits for ever.
    `shards_per_adapter`: how many partitions the requests of one adapter are spread over.
    `connect_timeout`: seconds that `start()` may take.
    `metadata_max_age`: seconds after which partitions added to a topic are noticed.
    `headers`: Kafka headers of every request, as `[("tenant", b"acme")]`.

    Raises `ValueError` naming the setting that is wrong.
    """

    def __init__(
        self,
        bootstrap_servers: str | None = None,
        *,
        connection: KafkaConnection | None = None,
        requests_topic: str = REQUESTS_TOPIC,
        replies_topic: str = REPLIES_TOPIC,
        stream_topic: str = STREAM_TOPIC,
        control_topic: str = CONTROL_TOPIC,
        client_id: str | None = None,
        timeout: float = 60.0,
        shards_per_adapter: int = 2,
        connect_timeout: float = 30.0,
        metadata_max_age: float = 10.0,
        headers: Headers = (),
    ) -> None:
        if connection is None:
            connection = kafka_connection(bootstrap_servers=bootstrap_servers or DEFAULT_SERVERS)
        elif bootstrap_servers is not None:
            raise ValueError("bootstrap_servers: given together with connection, which names its own")
        self._options: dict[str, Any] = {
            **connection.client_options(),
            "client_id": client_id or f"loramux-{os.getpid()}",
            "metadata_max_age_ms": int(metadata_max_age * 1000),
        }
        self._timeout = valid_timeout(timeout)
        self._connecting = partial(connecting, connection=connection, seconds=connect_timeout)
        self.replies_topic = replies_topic
        # A worker answers on its own replies topic unless told otherwise: a name of one's own must be told.
        self._reply_to = [] if replies_topic == REPLIES_TOPIC else [(REPLY_TO, replies_topic.encode())]
        self._headers = tuple(headers)
        self._pending = PendingReplies()
        self._partitions = PartitionChooser(shards_per_adapter)
        self._sender = RequestSender(requests_topic, self._options)
        self._replies = self._tail(replies_topic, self._pending.take_reply)
        self._stream_topic = stream_topic
        self._deltas: TopicTail | None = None
        self._starting_deltas = asyncio.Lock()
        self._canceller = Canceller(control_topic, self._options, self._connecting, self._replies.require_topics)
        self._sends: set[asyncio.Task[None]] = set()
        self._replies_from: Mapping[int, int] | None = None
        self._started = False
        self._closed = False
        self._failure: tuple[str, BaseException] | None = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Connect and stand at the end of the replies topic.

        Raises ClientError where a broker or a topic is missing. A client is started once; one that is closed,
        or did not start, cannot be started again.
        """
        if self._started or self._closed:
            raise ClientError("a client is started once: make a new one")
        self._started = True
        try:
            await self._connecting(self._connect())
        except BaseException:
            await self.close()
            raise

    def resume(self, positions: Mapping[int, int] | None, on_unclaimed: OnUnclaimed) -> None:
        """Before `start`: read the replies topic from `positions` on, where an earlier client stood (None: the end).

        `on_unclaimed` gets the correlation id and the value of every reply that no request of this client waits for.
        A program that must survive its own end keeps its requests, their correlation ids, and the `reply_positions`
        from before it asked. Started anew it waits for `caught_up` and asks what is unanswered again, unchanged.
        """
        self._replies_from = positions
        self._pending.on_unclaimed = on_unclaimed

    async def caught_up(self) -> None:
        """Wait until every reply that was there at the start has been read. Raises ClientError, ClientClosed."""
        self._require_usable()
        await self._replies.caught_up()
        self._require_usable()

    @property
    def reply_positions(self) -> dict[int, int]:
        """Partition of the replies topic → offset of the reply that is read next."""
        return self._replies.positions

    async def close(self) -> None:
        """Fail every request that waits with ClientClosed, and disconnect."""
        self._closed = True
        self._pending.fail_all(
            lambda request_id: ClientClosed(f"request {request_id}: the client was closed before it was answered")
        )
        sends = list(self._sends)
        for sending in sends:
            sending.cancel()
        if sends:
            await asyncio.wait(sends)
        parts = (self._sender, self._replies, self._deltas, self._canceller)
        await asyncio.gather(*(part.close() for part in parts if part is not None))

    async def generate(
        self, prompt: str | None = None, *, timeout: float | None = None, **fields: Unpack[RequestFields]
    ) -> Reply:
        """Ask and wait for the final reply.

        `prompt`, `messages=` or `prompt_token_ids=`; `adapter_id=` (none: the base model), `request_id=`,
        `priority=`, `deadline_ms=`, `metadata=`; every other keyword is a generation parameter. `timeout` in
        seconds. Raises `ValueError` for a request that breaks the contract, ReplyFailed for an error reply,
        ReplyTimeout, RequestTooLarge, ClientClosed, ClientError.
        """
        return await (await self.submit(prompt, timeout=timeout, **fields))

    async def submit(
        self, prompt: str | None = None, *, timeout: float | None = None, **fields: Unpack[RequestFields]
    ) -> asyncio.Future[Reply]:
        """Ask, and return once Kafka has the request; the future gets the reply.

        Arguments and errors of `generate`.
        """
        repeatable = fields.get("request_id") is not None
        return (await self._ask(build_request(prompt, **fields), timeout, repeatable=repeatable)).future

    async def submit_request(
        self, request: Request, *, timeout: float | None = None, correlation_id: bytes | None = None
    ) -> asyncio.Future[Reply]:
        """`submit` for a request that is already made; `correlation_id` is a new one unless given."""
        return (await self._ask(request, timeout, correlation_id=correlation_id)).future

    def stream(
        self, prompt: str | None = None, *, timeout: float | None = None, **fields: Unpack[RequestFields]
    ) -> ReplyStream:
        """Ask, and iterate over the answer as it is generated; then the iterator's `reply` is the final reply.

            async for delta in (answer := client.stream("Hello")):
                print(delta.text, end="")
            print(answer.reply.usage)

        Arguments and errors of `generate`.
        """
        return self._stream(build_request(prompt, **fields), timeout, fields.get("request_id") is not None)

    def stream_request(self, request: Request, *, timeout: float | None = None) -> ReplyStream:
        """`stream` for a request that is already made."""
        return self._stream(request, timeout, True)

    def _stream(self, request: Request, timeout: float | None, repeatable: bool) -> ReplyStream:
        streamed = request.model_copy(update={"stream": True})
        return ReplyStream(streamed, lambda take: self._ask(streamed, timeout, on_delta=take, repeatable=repeatable))

    async def cancel(self, request_id: str) -> None:
        """Have a request stopped, this client's or anybody's; returns once Kafka has the cancellation.

        In whatever state it is, its one final reply is then an error reply with the code `cancelled`; a request that
        has been answered stays as it is. Raises `ValueError` for what is no request_id, ClientError, ClientClosed.
        """
        self._require_usable()
        await self._canceller.send(Cancellation.of(request_id))

    async def _connect(self) -> None:
        await self._sender.start()
        # In this order: no request is produced before the place where its reply will appear is being read.
        await self._replies.start(self._replies_from)
        await self._replies.require_topics(self._sender.topic)

    async def _ask(
        self,
        request: Request,
        timeout: float | None,
        *,
        on_delta: OnDelta | None = None,
        correlation_id: bytes | None = None,
        repeatable: bool = True,
    ) -> PendingReply:
        """Produce a request; returns when Kafka has it, or earlier when its future is done.

        One that is `repeatable`, as its id was the caller's choice, goes where it would go again.
        """
        self._require_usable()
        seconds = self._timeout if timeout is None else timeout
        pending = self._pending.open(request, seconds, on_delta, correlation_id)
        sending = asyncio.create_task(self._send(pending, repeatable))
        self._sends.add(sending)
        sending.add_done_callback(self._sent)
        try:
            await asyncio.wait((sending, pending.future), return_when=asyncio.FIRST_COMPLETED)
            if not pending.future.done():
                sending.result()
        except BaseException:
            pending.future.cancel()
            raise
        finally:
            sending.cancel()
        return pending

    async def _send(self, pending: PendingReply, repeatable: bool) -> None:
        request = pending.request
        if pending.on_delta is not None:
            await self._follow_deltas()
        num_partitions = await self._sender.num_partitions()
        adapter_id = None if request.adapter is None else request.adapter.adapter_id
        partition = self._partitions.take(adapter_id, num_partitions, request.request_id if repeatable else None)
        pending.future.add_done_callback(lambda _: self._partitions.release(partition))
        await self._sender.send(
            partition=partition,
            key=(request.adapter_id or "").encode(),
            value=request.to_json(),
            headers=[(CORRELATION_ID, pending.correlation_id), *self._reply_to, *self._headers],
        )

    def _sent(self, sending: asyncio.Task[None]) -> None:
        self._sends.discard(sending)
        # Looked at, so that asyncio does not complain about the error of a request that nobody waits for.
        if not sending.cancelled():
            sending.exception()

    async def _follow_deltas(self) -> None:
        """Stand at the end of the stream topic; who never streams need not read it."""
        async with self._starting_deltas:
            if self._deltas is None:
                deltas = self._tail(self._stream_topic, self._pending.take_delta)
                await self._connecting(deltas.start())
                self._deltas = deltas

    def _tail(self, topic: str, take: Callable[[Sequence[tuple[str, bytes]], bytes | None], None]) -> TopicTail:
        return TopicTail(
            topic,
            self._options,
            on_record=lambda record: take(record.headers, record.value),
            on_failure=partial(self._reader_failed, topic),
        )

    def _reader_failed(self, topic: str, cause: BaseException) -> None:
        self._failure = topic, cause
        reason = f"reading topic {topic} ended: {cause!r}"
        self._pending.fail_all(lambda request_id: ClientError(f"request {request_id}: {reason}"), cause)

    def _require_usable(self) -> None:
        if self._closed:
            raise ClientClosed("the client is closed")
        if self._failure is not None:
            topic, cause = self._failure
            raise ClientError(f"reading topic {topic} ended, make a new client: {cause!r}") from cause
        if not self._started:
            raise ClientError("the client is not started: use `async with client` or `await client.start()`")
