"""The client: produces requests, reads replies, and brings the two together."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self, Unpack

from aiokafka.errors import KafkaConnectionError, KafkaError
from aiokafka.structs import ConsumerRecord

from loramux_producer.connection import DEFAULT_SERVERS, kafka_connection
from loramux_producer.errors import ClientClosed, ClientError
from loramux_producer.partitions import PartitionChooser
from loramux_producer.pending import OnDelta, PendingReplies, PendingReply, valid_timeout
from loramux_producer.requests import RequestFields, build_request
from loramux_producer.sender import RequestSender
from loramux_producer.stream import ReplyStream
from loramux_producer.tail import TopicTail
from loramux_schemas import (
    REPLIES_TOPIC,
    REQUESTS_TOPIC,
    STREAM_TOPIC,
    Headers,
    KafkaConnection,
    Reply,
    Request,
)
from loramux_schemas.handshake import diagnose
from loramux_schemas.headers import CORRELATION_ID, REPLY_TO


class Client:
    """Asks loramux workers through Kafka.

        async with Client("localhost:9092") as client:
            reply = await client.generate("Hello", adapter_id="acme/support", max_new_tokens=32)

    One client serves any number of concurrent requests of one event loop. It reads the replies topic from its
    end on, without a consumer group, so any number of clients share the topics.

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
        self._connection = connection
        self._servers = connection.bootstrap_servers
        self._options: dict[str, Any] = {
            **connection.client_options(),
            "client_id": client_id or f"loramux-{os.getpid()}",
            "metadata_max_age_ms": int(metadata_max_age * 1000),
        }
        self._timeout = valid_timeout(timeout)
        self._connect_timeout = connect_timeout
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
        self._sends: set[asyncio.Task[None]] = set()
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
        tails = [self._replies] if self._deltas is None else [self._replies, self._deltas]
        await asyncio.gather(self._sender.close(), *(tail.close() for tail in tails))

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
        return await self.submit_request(build_request(prompt, **fields), timeout=timeout)

    async def submit_request(self, request: Request, *, timeout: float | None = None) -> asyncio.Future[Reply]:
        """`submit` for a request that is already made."""
        return (await self._ask(request, timeout)).future

    def stream(
        self, prompt: str | None = None, *, timeout: float | None = None, **fields: Unpack[RequestFields]
    ) -> ReplyStream:
        """Ask, and iterate over the answer as it is generated; then the iterator's `reply` is the final reply.

            async for delta in (answer := client.stream("Hello")):
                print(delta.text, end="")
            print(answer.reply.usage)

        Arguments and errors of `generate`.
        """
        return self.stream_request(build_request(prompt, **fields), timeout=timeout)

    def stream_request(self, request: Request, *, timeout: float | None = None) -> ReplyStream:
        """`stream` for a request that is already made."""
        streamed = request.model_copy(update={"stream": True})
        return ReplyStream(streamed, lambda on_delta: self._ask(streamed, timeout, on_delta))

    async def _connect(self) -> None:
        await self._sender.start()
        # In this order: no request is produced before the place where its reply will appear is being read.
        await self._replies.start()
        await self._replies.require_topics(self._sender.topic)

    async def _ask(self, request: Request, timeout: float | None, on_delta: OnDelta | None = None) -> PendingReply:
        """Produce a request; returns when Kafka has it, or earlier when its future is done."""
        self._require_usable()
        pending = self._pending.open(request, self._timeout if timeout is None else timeout, on_delta)
        sending = asyncio.create_task(self._send(pending))
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

    async def _send(self, pending: PendingReply) -> None:
        request = pending.request
        if pending.on_delta is not None:
            await self._follow_deltas()
        num_partitions = await self._sender.num_partitions()
        adapter = request.adapter
        partition = self._partitions.take(None if adapter is None else adapter.adapter_id, num_partitions)
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

    async def _connecting(self, connecting: Awaitable[None]) -> None:
        try:
            async with asyncio.timeout(self._connect_timeout):
                await connecting
        except TimeoutError as error:
            raise ClientError(f"Kafka at {self._servers} did not answer within {self._connect_timeout:g} s") from error
        except (KafkaConnectionError, OSError) as error:
            raise ClientError(await self._why_unreachable()) from error
        except KafkaError as error:
            raise ClientError(f"Kafka at {self._servers}: {error}") from error

    async def _why_unreachable(self) -> str:
        diagnosis = await diagnose(self._connection)
        if diagnosis is not None and diagnosis.permanent:
            return f"Kafka refuses this client: {diagnosis.reason}"
        reason = f" ({diagnosis.reason})" if diagnosis is not None else ""
        return f"no Kafka broker answers at {self._servers}{reason}"

    def _tail(self, topic: str, take: Callable[[Sequence[tuple[str, bytes]], bytes | None], None]) -> TopicTail:
        def on_record(record: ConsumerRecord[bytes, bytes]) -> None:
            take(record.headers, record.value)

        on_failure = partial(self._reader_failed, topic)
        return TopicTail(topic, self._options, on_record=on_record, on_failure=on_failure)

    def _reader_failed(self, topic: str, cause: BaseException) -> None:
        self._failure = topic, cause
        self._pending.fail_all(
            lambda request_id: ClientError(f"request {request_id}: reading topic {topic} ended: {cause!r}"),
            cause,
        )

    def _require_usable(self) -> None:
        if self._closed:
            raise ClientClosed("the client is closed")
        if self._failure is not None:
            topic, cause = self._failure
            raise ClientError(f"reading topic {topic} ended, make a new client: {cause!r}") from cause
        if not self._started:
            raise ClientError("the client is not started: use `async with client` or `await client.start()`")
