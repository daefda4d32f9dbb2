"""A stand-in for a worker: answers requests over real Kafka, in the ways that its requests ask for.

    async with Responder(kafka.bootstrap_servers, requests, replies, stream) as responder:
        … metadata={"silent": True} …

What the `metadata` of a request may hold:

    silent: true                       no answer
    copies: 3                          the final reply, so many times, as at-least-once workers may send it
    error: "internal", times: 2        an error reply with this code, at the first two asks of this request_id
    deltas: "twice" | "backwards"      how the deltas of a streamed request come
    reply: "first" | "held"            the final reply before any delta, or only after `release()`
    value: "…"                         this instead of the JSON of the reply
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any, Self

from aiokafka import AIOKafkaConsumer, AIOKafkaProducer, TopicPartition
from aiokafka.structs import ConsumerRecord

from loramux_producer import Client
from loramux_schemas import ErrorCode, Reply, ReplyRoute, Request, StreamDelta, Usage


def answer_text(request: Request) -> str:
    """What the responder generates: words, so that there are deltas, and different for every adapter."""
    return f"{request.adapter_id or 'base'} answers {request.prompt}"


def pieces(request: Request) -> list[str]:
    """The text of each delta of a streamed request."""
    words = answer_text(request).split(" ")
    return [word if i == 0 else f" {word}" for i, word in enumerate(words)]


def ok_reply(request: Request) -> Reply:
    """The final reply to a request that asks for nothing special: one token a word."""
    adapter = request.adapter
    tokens = tuple(range(len(pieces(request))))
    return Reply(
        request_id=request.request_id,
        adapter_id=None if adapter is None else adapter.adapter_id,
        generated_text=answer_text(request),
        token_ids=tokens,
        usage=Usage(prompt_tokens=1, completion_tokens=len(tokens)),
        worker="responder",
        metadata=request.metadata,
    )


class Responder:
    """Reads the requests topic from its beginning and answers every request, those of one poll in a random order.

    `records` and `asked` hold what was read: the records, and how often each request_id came. After `limit` requests
    the others get no answer.
    """

    def __init__(self, bootstrap_servers: str, requests_topic: str, replies_topic: str, stream_topic: str) -> None:
        self.records: list[ConsumerRecord[bytes, bytes]] = []
        self.asked: Counter[str] = Counter()
        self.limit: float = math.inf
        self._read_to: Counter[TopicPartition] = Counter()
        self._held: list[tuple[Request, ConsumerRecord[bytes, bytes]]] = []
        self._topics = requests_topic, replies_topic, stream_topic
        self._servers = bootstrap_servers
        self._order = random.Random(7)
        self._news = asyncio.Condition()

    async def __aenter__(self) -> Self:
        self._consumer = AIOKafkaConsumer(
            self._topics[0], bootstrap_servers=self._servers, group_id=None, auto_offset_reset="earliest"
        )
        self._producer = AIOKafkaProducer(bootstrap_servers=self._servers, acks="all")
        await self._consumer.start()
        await self._producer.start()
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        died = self._task.done()
        self._task.cancel()
        await asyncio.wait([self._task])
        await self._consumer.stop()
        await self._producer.stop()
        if died:
            self._task.result()

    async def wait_asked(self, count: int) -> None:
        """Until `count` requests have been read in all."""
        async with self._news:
            await self._news.wait_for(lambda: self.asked.total() >= count)

    async def settle(self) -> None:
        """Until every request that is in the topic has been read, and every reply to them acknowledged."""
        number_of = self._consumer.partitions_for_topic(self._topics[0])
        partitions = [TopicPartition(self._topics[0], number) for number in number_of]
        ends = await self._consumer.end_offsets(partitions)
        async with self._news:
            await self._news.wait_for(lambda: all(self._read_to[p] >= ends[p] for p in partitions))
        await self._producer.flush()

    async def _run(self) -> None:
        while True:
            batches = await self._consumer.getmany(timeout_ms=200)
            records = [record for batch in batches.values() for record in batch]
            self._order.shuffle(records)
            for record in records:
                self.records.append(record)
                request = Request.from_json(record.value)
                self.asked[request.request_id] += 1
                at = TopicPartition(record.topic, record.partition)
                self._read_to[at] = max(self._read_to[at], record.offset + 1)  # they come shuffled
                await self.answer(request, record)
            async with self._news:
                self._news.notify_all()

    async def answer(self, request: Request, record: ConsumerRecord[bytes, bytes]) -> None:
        """Produces the deltas and the final reply of one request, without waiting for the broker."""
        wishes = request.metadata or {}
        if wishes.get("silent") or self.asked.total() > self.limit:
            return
        match wishes.get("reply"):
            case "first":
                await self._send_reply(request, record)
                await self._send_deltas(request, record)
            case "held":
                await self._send_deltas(request, record)
                self._held.append((request, record))
            case _:
                await self._send_deltas(request, record)
                await self._send_reply(request, record)

    async def release(self) -> None:
        """Sends the final replies that were held back."""
        for request, record in self._held:
            await self._send_reply(request, record)
        self._held.clear()

    async def _send_deltas(self, request: Request, record: ConsumerRecord[bytes, bytes]) -> None:
        for delta in self._deltas(request) if request.stream else ():
            await self._send(self._topics[2], request, record, delta.to_json())

    async def _send_reply(self, request: Request, record: ConsumerRecord[bytes, bytes]) -> None:
        wishes = request.metadata or {}
        value = wishes["value"].encode() if "value" in wishes else self._reply(request).to_json()
        for _ in range(wishes.get("copies", 1)):
            await self._send(self._topics[1], request, record, value)

    async def _send(self, topic: str, request: Request, record: ConsumerRecord[bytes, bytes], value: bytes) -> None:
        headers = list(ReplyRoute.from_headers(record.headers).echo)
        await self._producer.send(topic, value, key=request.request_id.encode(), headers=headers)

    def _reply(self, request: Request) -> Reply:
        wishes = request.metadata or {}
        if "error" not in wishes or self.asked[request.request_id] > wishes.get("times", 1 << 30):
            return ok_reply(request)
        return Reply.failure(
            ErrorCode(wishes["error"]), "as asked", request_id=request.request_id, metadata=request.metadata
        )

    def _deltas(self, request: Request) -> list[StreamDelta]:
        deltas = [
            StreamDelta(request_id=request.request_id, index=i, text=text, token_ids=(i,))
            for i, text in enumerate(pieces(request))
        ]
        match (request.metadata or {}).get("deltas"):
            case "twice":
                return [delta for delta in deltas for _ in range(2)]
            case "backwards":
                return deltas[::-1]
        return deltas


@dataclass(frozen=True)
class Topics:
    """One test's own topics on the shared broker."""

    servers: str
    requests: str
    replies: str
    stream: str

    def client(self, **settings: Any) -> Client:
        names = {"requests_topic": self.requests, "replies_topic": self.replies, "stream_topic": self.stream}
        return Client(self.servers, **names, **{"timeout": 60.0, **settings})

    def responder(self) -> Responder:
        return Responder(self.servers, self.requests, self.replies, self.stream)
